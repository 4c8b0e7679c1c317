// Cutting rows into tiles: as few as fit, and as even as possible, so that no tile is left with one row.
#pragma once

namespace kt_expert {

// Calls body(first, count) for balanced pieces of at most `limit` rows.
template <typename Body>
void for_each_tile(int rows, int limit, Body body) {
  const int tiles = (rows + limit - 1) / limit;
  int first = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int count = (rows - first) / (tiles - tile);
    body(first, count);
    first += count;
  }
}

}  // namespace kt_expert

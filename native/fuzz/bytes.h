// The bytes of one fuzz input as numbers, taken round and round as often as a target asks for.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace kt_expert {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t next() { return size_ == 0 ? 0 : data_[at_++ % size_]; }
  std::vector<std::uint8_t> take(std::size_t count) {
    std::vector<std::uint8_t> taken(count);
    for (std::uint8_t& byte : taken) byte = next();
    return taken;
  }
  // Any bit pattern: infinities, subnormals and what is no number, too.
  float any_float() {
    const std::vector<std::uint8_t> bytes = take(sizeof(float));
    float value = 0.0f;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  // Mostly ordinary values, as a trainer sends them.
  float likely_float() {
    return next() % 32 == 0 ? any_float() : static_cast<float>(static_cast<std::int8_t>(next())) / 64.0f;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

// What must hold whatever came in.
inline void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace kt_expert

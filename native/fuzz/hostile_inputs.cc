// The fuzz target on COUNT random inputs from a seed on: kt_expert_hostile_inputs COUNT SEED. What a coverage-guided
// fuzzer does for hours by searching, this does in a known time, with any compiler and under its sanitizers.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s COUNT SEED\n", argv[0]);
    return 2;
  }
  constexpr std::size_t kMostBytes = 300;
  const long long count = std::atoll(argv[1]);
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  std::vector<std::uint8_t> bytes;
  for (long long input = 0; input < count; ++input) {
    bytes.resize(random() % kMostBytes);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    if (LLVMFuzzerTestOneInput(bytes.data(), bytes.size()) != 0) return 1;
  }
  std::printf("hostile inputs: %lld from seed %s, none did harm\n", count, argv[2]);
  return 0;
}

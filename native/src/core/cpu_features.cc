#include "kt_expert/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

struct Feature {
  const char* name;
  bool present;
};

std::string missing_of(std::initializer_list<Feature> features) {
  std::string missing;
  for (const Feature& feature : features) {
    if (!feature.present) missing += (missing.empty() ? "" : ", ") + std::string(feature.name);
  }
  return missing.empty() ? "" : "this CPU or kernel lacks " + missing;
}

// The compiler's run-time checks also read XGETBV, so a kernel that does not save a register's state says no here.
std::string avx2_obstacle() {
  return missing_of({{"avx2", __builtin_cpu_supports("avx2") != 0},
                     {"fma", __builtin_cpu_supports("fma") != 0},
                     {"f16c", __builtin_cpu_supports("f16c") != 0}});
}

std::string avx512_obstacle() {
  return missing_of({{"avx512f", __builtin_cpu_supports("avx512f") != 0},
                     {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
                     {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
                     {"avx512dq", __builtin_cpu_supports("avx512dq") != 0}});
}

std::string join(const std::string& first, const std::string& second) { return first.empty() ? second : first; }

// Intel SDM, volume 1, chapter 18: tile data is state component 18, which Linux hands out only when asked.
std::string tile_permission_obstacle() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  static const int kRefusal = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
  if (kRefusal == 0) return "";
  return std::string("the kernel refuses AMX tiles (") + std::strerror(kRefusal) + "); Linux 5.16 or newer is needed";
}

std::string amx_obstacle(bool int8) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  const std::string missing = missing_of(
      {{"amx-tile", (d & kTile) != 0}, {"amx-bf16", (d & kBf16) != 0}, {"amx-int8", !int8 || (d & kInt8) != 0}});
  return missing.empty() ? tile_permission_obstacle() : missing;
}

}  // namespace

std::vector<Isa> all_isas() {
  return {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16, Isa::kAmxBf16, Isa::kAmxInt8};
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmxBf16:
      return "amx_bf16";
    case Isa::kAmxInt8:
      return "amx_int8";
  }
  return "unknown";
}

Isa isa_from_name(const std::string& name) {
  std::string known;
  for (Isa isa : all_isas()) {
    if (name == isa_name(isa)) return isa;
    known += known.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw InvalidArgument("instruction set '" + name + "' is not known; choose one of: " + known);
}

std::string isa_obstacle(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "";
    case Isa::kAvx2:
      return avx2_obstacle();
    case Isa::kAvx512:
      return avx512_obstacle();
    case Isa::kAvx512Vnni:
      return join(avx512_obstacle(), missing_of({{"avx512vnni", __builtin_cpu_supports("avx512vnni") != 0}}));
    case Isa::kAvx512Bf16:
      return join(avx512_obstacle(), missing_of({{"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0}}));
    case Isa::kAmxBf16:
      return join(isa_obstacle(Isa::kAvx512Bf16), amx_obstacle(false));
    case Isa::kAmxInt8:
      return join(join(isa_obstacle(Isa::kAvx512Bf16), isa_obstacle(Isa::kAvx512Vnni)), amx_obstacle(true));
  }
  return "no such instruction set";
}

Isa choose_isa(const std::string& forced) {
  if (!forced.empty()) {
    const Isa isa = isa_from_name(forced);
    const std::string obstacle = isa_obstacle(isa);
    if (!obstacle.empty()) throw Unsupported("instruction set '" + forced + "' was asked for, but " + obstacle);
    return isa;
  }
  Isa best = Isa::kScalar;
  for (Isa isa : all_isas()) {
    if (!rounds_activations(isa) && isa_supported(isa)) best = isa;
  }
  return best;
}

std::string explain_choice(const std::string& forced) {
  if (!forced.empty()) return "asked for by name";
  const Isa chosen = choose_isa(forced);
  for (Isa isa : all_isas()) {
    if (isa > chosen && !rounds_activations(isa)) {
      return std::string("the highest this machine offers; ") + isa_name(isa) + ": " + isa_obstacle(isa);
    }
  }
  return "the highest there is";
}

}  // namespace kt_expert

#include "kt_expert/topology.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "kt_expert/error.h"

namespace kt_expert {
namespace {

constexpr char kNodesDirectory[] = "/sys/devices/system/node/";
constexpr int kPreferred = 1;  // MPOL_PREFERRED of <linux/mempolicy.h>: elsewhere where the node is full

constexpr int kWordBits = 8 * sizeof(unsigned long);

// All zeros where the kernel refuses.
CpuMask own_mask() {
  CpuMask mask = {};
  syscall(SYS_sched_getaffinity, 0, sizeof mask, mask.data());
  return mask;
}

bool set_own_mask(const CpuMask& mask) { return syscall(SYS_sched_setaffinity, 0, sizeof mask, mask.data()) == 0; }

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<int> own_cpus() {
  const CpuMask mask = own_mask();
  std::vector<int> cpus;
  for (int cpu = 0; cpu < static_cast<int>(mask.size()) * kWordBits; ++cpu) {
    if ((mask[static_cast<std::size_t>(cpu / kWordBits)] >> (cpu % kWordBits) & 1) != 0) cpus.push_back(cpu);
  }
  return cpus;
}

}  // namespace

std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> numbers;
  std::size_t at = 0;
  const auto number = [&] {
    std::size_t digits = 0;
    while (at + digits < text.size() && text[at + digits] >= '0' && text[at + digits] <= '9') ++digits;
    constexpr std::size_t kMostDigits = 6;
    if (digits == 0 || digits > kMostDigits) throw InvalidArgument("'" + text + "' is no list of cores");
    const int value = std::stoi(text.substr(at, digits));
    at += digits;
    return value;
  };
  while (at < text.size()) {
    const int first = number();
    int last = first;
    if (at < text.size() && text[at] == '-') {
      ++at;
      last = number();
    }
    if (last < first) throw InvalidArgument("'" + text + "' is no list of cores");
    for (int value = first; value <= last; ++value) numbers.push_back(value);
    if (at == text.size()) break;
    if (text[at] != ',' || ++at == text.size()) throw InvalidArgument("'" + text + "' is no list of cores");
  }
  return numbers;
}

std::vector<MemoryNode> memory_nodes() {
  const std::vector<int> own = own_cpus();
  const std::string online = read_line(std::string(kNodesDirectory) + "online");
  std::vector<MemoryNode> nodes;
  for (const int id : parse_cpu_list(online)) {
    MemoryNode node{id, {}};
    const std::string cpus = read_line(kNodesDirectory + ("node" + std::to_string(id)) + "/cpulist");
    for (const int cpu : parse_cpu_list(cpus)) {
      if (std::find(own.begin(), own.end(), cpu) != own.end()) node.cpus.push_back(cpu);
    }
    if (!node.cpus.empty()) nodes.push_back(std::move(node));
  }
  if (nodes.empty()) nodes.push_back({0, own});
  return nodes;
}

PinnedThread::PinnedThread(const std::vector<int>& cpus) noexcept {
  if (cpus.empty()) return;
  before_ = own_mask();
  CpuMask wanted = {};
  for (const int cpu : cpus) {
    const std::size_t word = static_cast<std::size_t>(cpu / kWordBits);
    if (word < wanted.size()) wanted[word] |= 1ul << (cpu % kWordBits);
  }
  pinned_ = set_own_mask(wanted);
}

PinnedThread::~PinnedThread() {
  if (pinned_) set_own_mask(before_);
}

std::string prefer_node(void* data, std::size_t bytes, int node) {
  if (node < 0 || node >= kMaxMemoryNodes) return "there is no memory node " + std::to_string(node);
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t address = reinterpret_cast<std::size_t>(data);
  const std::size_t first = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end <= first) return "";
  const unsigned long mask = 1ul << node;
  // The kernel reads one bit fewer than it is told.
  if (syscall(SYS_mbind, first, end - first, kPreferred, &mask, static_cast<unsigned long>(kMaxMemoryNodes) + 1, 0u) ==
      0)
    return "";
  return std::string("mbind: ") + std::strerror(errno);
}

}  // namespace kt_expert

// The machine's memory nodes: which cores are near which memory, and putting threads and pages there.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

namespace kt_expert {

struct MemoryNode {
  int id = 0;
  std::vector<int> cpus;  // those this process may run on
};

// Nodes with at least one core of this process, from sysfs; one node 0 with all cores where the kernel does not tell.
std::vector<MemoryNode> memory_nodes();
constexpr int kMaxMemoryNodes = 64;  // one word of the kernel's node mask
// Numbers of a kernel list such as "0-3,8,10-11". Throws InvalidArgument for anything else.
std::vector<int> parse_cpu_list(const std::string& text);

// A mask of cores as the kernel reads and writes it: 8192 is the most Linux can be built for on x86-64, cpu_set_t ends
// at 1024.
using CpuMask = std::array<unsigned long, 128>;

// Keeps the calling thread on some cores for the object's lifetime; none leave it where it is. A refusal of the kernel
// is no error: the thread then runs where it may.
class PinnedThread {
 public:
  explicit PinnedThread(const std::vector<int>& cpus) noexcept;
  ~PinnedThread();
  PinnedThread(const PinnedThread&) = delete;
  PinnedThread& operator=(const PinnedThread&) = delete;

 private:
  CpuMask before_ = {};
  bool pinned_ = false;
};

// Asks that the pages of fresh memory, whole pages of it, come from a node. Returns what stands in the way, empty where
// nothing does.
std::string prefer_node(void* data, std::size_t bytes, int node);

}  // namespace kt_expert

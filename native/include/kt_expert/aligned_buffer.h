// An owned, cache-line aligned, zero-filled array. Large ones come from mmap, so untouched pages cost no memory
// and the kernel may back them with huge pages.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

namespace kt_expert {

template <typename T>
class AlignedBuffer {
 public:
  static constexpr std::size_t kMapThresholdBytes = 1024 * 1024;  // below, a fresh mapping costs more than it saves

  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t count) : count_(count) {
    if (count == 0) return;
    bytes_ = count * sizeof(T);
    if (bytes_ >= kMapThresholdBytes) {
      void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) throw std::bad_alloc();
      madvise(mapped, bytes_, MADV_HUGEPAGE);  // a refusal only means ordinary pages
      data_ = static_cast<T*>(mapped);
      mapped_ = true;
      return;
    }
    data_ = static_cast<T*>(::operator new(bytes_, std::align_val_t{kAlignmentBytes}));
    std::memset(static_cast<void*>(data_), 0, bytes_);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() {
    if (data_ == nullptr) return;
    if (mapped_) {
      munmap(data_, bytes_);
    } else {
      ::operator delete(data_, std::align_val_t{kAlignmentBytes});
    }
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  // Makes a mapped buffer hold `count` > 0 elements: the kernel takes pages from its end or adds zeros there, and may
  // move all of them elsewhere without a copy. Throws std::bad_alloc and changes nothing where it cannot.
  void remap(std::size_t count) {
    void* moved = mremap(data_, bytes_, count * sizeof(T), MREMAP_MAYMOVE);
    if (moved == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(moved);
    count_ = count;
    bytes_ = count * sizeof(T);
  }
  // Whether its pages are its own: a mapping, not a piece of the heap.
  bool is_mapped() const { return mapped_; }
  T& operator[](std::size_t index) { return data_[index]; }
  const T& operator[](std::size_t index) const { return data_[index]; }

 private:
  static constexpr std::size_t kAlignmentBytes = 64;  // one cache line, one AVX-512 register, one tile row

  void swap(AlignedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
  }

  T* data_ = nullptr;
  std::size_t count_ = 0;
  std::size_t bytes_ = 0;
  bool mapped_ = false;
};

}  // namespace kt_expert

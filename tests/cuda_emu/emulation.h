// Runs CUDA kernels on the CPU, to find what a compiler can't: missing barriers, threads that wait for each other for
// ever, accesses beside an array or off their alignment, and maps that are read twice.
//
// Every CUDA thread is a fiber, with a stack of its own; one fiber runs at a time, until it waits or ends. Between two
// waits a fiber isn't interrupted, but which one goes next is drawn: warps are held back for long, and blocks come in
// any order, so that what isn't ordered by a barrier or a shuffle happens in both orders.
//
//   * __syncthreads waits for all threads of the block; __shfl_xor_sync for the lanes of its mask, which must be at
//     the same place in the program. What waits for ever is reported.
//   * Shared memory begins as NaN, in every block, and has guards behind it.
//   * Global memory is reached through `touch`, which knows all arrays: beside them, misaligned, or written although
//     constant is an error. It counts bytes, so that passes over a map can be asserted.
//
// Not modelled: weak memory ordering (fences), clusters, distributed shared memory, bulk copies, atomics. No kernel
// here has any of them.
#pragma once

#include <sys/mman.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASSEMBLER
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) ulonglong2 {
  uint64_t x, y;
};

namespace emulation {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int kWarp = 32, kBlock = 256;

// A defect of the kernel that runs.
struct Defect : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- global memory
struct Array {
  uintptr_t begin, end;
  bool map, writable;
  std::string name;
};

struct Memory {
  std::map<uintptr_t, Array> arrays;  // by their end
  const Array* last = nullptr;
  int64_t read = 0, written = 0;     // bytes of feature maps
  int64_t narrow = 0, accesses = 0;  // accesses of feature maps, and those of less than 16 bytes
};
inline Memory& memory() {
  static Memory all;
  return all;
}

[[noreturn]] void defect(const std::string& what);

inline void touch(const void* p, size_t bytes, bool write) {
  Memory& m = memory();
  const uintptr_t from = reinterpret_cast<uintptr_t>(p), to = from + bytes;
  if (!m.last || from < m.last->begin || to > m.last->end) {
    const auto found = m.arrays.upper_bound(from);
    if (found == m.arrays.end() || from < found->second.begin || to > found->second.end)
      defect("access beside every array");
    m.last = &found->second;
  }
  if (from % bytes) defect("misaligned access to " + m.last->name);
  if (write && !m.last->writable) defect("write to the constant " + m.last->name);
  if (!m.last->map) return;
  (write ? m.written : m.read) += int64_t(bytes);
  ++m.accesses;
  m.narrow += bytes < 16;
}

// An array that kernels may touch, as long as it lives. `skip`: elements it lies off 16 bytes. Outputs begin as NaN.
template <class T>
class Device {
 public:
  Device(const std::string& name, int64_t size, bool map, bool writable, int64_t skip = 0)
      : bytes_(size_t(size + skip) * sizeof(T) + 32), size_(size) {
    const uintptr_t raw = reinterpret_cast<uintptr_t>(bytes_.data());
    data_ = reinterpret_cast<T*>((raw + 15) / 16 * 16) + skip;
    std::memset(bytes_.data(), 0xff, bytes_.size());
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data_), end = begin + size_t(size) * sizeof(T);
    key_ = end;
    if (size) memory().arrays[end] = {begin, end, map, writable, name};
    memory().last = nullptr;
  }
  ~Device() {
    if (size_) memory().arrays.erase(key_);
    memory().last = nullptr;
  }
  Device(const Device&) = delete;
  T* get() { return size_ ? data_ : nullptr; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  std::vector<unsigned char> bytes_;
  T* data_;
  int64_t size_;
  uintptr_t key_ = 0;
};

// One so large that it isn't there: pages that nobody touches have no memory, and read as 0.
template <class T>
class Sparse {
 public:
  Sparse(const std::string& name, int64_t size, bool writable) : bytes_(size_t(size) * sizeof(T)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::runtime_error("no address space for " + name);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data_);
    memory().arrays[begin + bytes_] = {begin, begin + bytes_, true, writable, name};
    memory().last = nullptr;
  }
  ~Sparse() {
    memory().arrays.erase(reinterpret_cast<uintptr_t>(data_) + bytes_);
    memory().last = nullptr;
    munmap(data_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  T* get() { return static_cast<T*>(data_); }
  T& operator[](int64_t i) { return get()[i]; }

 private:
  size_t bytes_;
  void* data_;
};

// ---- fibers
enum class Wait { none, block, lanes };

struct Three {
  unsigned x = 0, y = 0, z = 0;
};

struct Fiber {
#ifdef EMULATION_ASSEMBLER
  void* stack = nullptr;
#else
  ucontext_t context;
#endif
  Three thread;
  bool done = false;
  Wait wait = Wait::none;
  // The shuffle it waits in: who takes part, where it stands, what it gives, whose value it takes.
  unsigned mask = 0;
  const void* site = nullptr;
  uint64_t gives = 0, takes = 0;
  int from = 0;
};

#ifdef EMULATION_ASSEMBLER
// Saves the callee's registers of the System V ABI on this stack, and goes on where the other one left.
extern "C" void emulation_switch(void** left, void* entered);
asm(R"(
.text
.weak emulation_switch
.type emulation_switch,@function
emulation_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
.size emulation_switch, .-emulation_switch
)");
#endif

// The order of a launch: seed 0 takes threads and blocks by their numbers. last: run only so many blocks at the end.
struct Schedule {
  unsigned seed = 0;
  int64_t last = 0;
};

class Block {
 public:
  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }
  Fiber& fiber() { return *current_; }
  Three index;

  Block() {
    stacks_.resize(kBlock);
    for (auto& stack : stacks_) stack.reset(new unsigned char[kStack]);
  }

  // Runs one block to its end.
  void run(unsigned number, size_t shared, const std::function<void()>& body, std::mt19937& draw, bool shuffled) {
    running() = this;
    index.x = number;
    body_ = &body;
    arena_.clear();
    dynamic_bytes_ = shared;
    dynamic_ = nullptr;
    failure_.clear();
    arrived_ = 0;
    fibers_.assign(kBlock, Fiber());
    for (int i = 0; i < kBlock; ++i) start(i);
    std::vector<int> order(kBlock);
    for (int i = 0; i < kBlock; ++i) order[i] = i;
    int held[kBlock / kWarp] = {};
    for (int left = kBlock; left > 0;) {
      if (shuffled) {
        std::shuffle(order.begin(), order.end(), draw);
        const unsigned luck = draw();
        if (luck % 8 == 0) held[luck / 8 % (kBlock / kWarp)] = int(luck / 64 % 32);
        if (luck % 64 == 1)
          for (auto& h : held) h = int(draw() % 16);
      }
      bool moved = false, slept = false;
      for (const int i : order) {
        Fiber& f = fibers_[i];
        if (f.done || f.wait != Wait::none) continue;
        if (held[i / kWarp] > 0) {
          slept = true;
          continue;
        }
        moved = true;
        enter(f);
        if (!failure_.empty()) throw Defect(failure_ + " (block " + std::to_string(number) + ")");
        left -= f.done;
      }
      for (auto& h : held) h -= h > 0;
      if (!moved && !slept && left > 0) throw Defect(stuck(number));
    }
    for (const auto& [key, piece] : arena_)
      for (size_t i = piece.size - kGuard; i < piece.size; ++i)
        if (piece.bytes[i] != 0xff) throw Defect("write behind shared memory (block " + std::to_string(number) + ")");
  }

  // ---- what kernels call
  void* shared(const void* key, size_t bytes) {
    Piece& piece = arena_[key];
    if (!piece.bytes) {
      piece.size = bytes + kGuard;
      piece.bytes.reset(new (std::align_val_t(16)) unsigned char[piece.size]);
      std::memset(piece.bytes.get(), 0xff, piece.size);  // NaN in every floating type
    }
    return piece.bytes.get();
  }
  void* dynamic() { return shared(&dynamic_, dynamic_bytes_); }

  void barrier() {
    Fiber& f = *current_;
    f.wait = Wait::block;
    if (++arrived_ == kBlock) {
      arrived_ = 0;
      for (auto& other : fibers_) other.wait = Wait::none;
      return;
    }
    leave();
  }

  uint64_t exchange(unsigned mask, int from, uint64_t value, const void* site) {
    Fiber& f = *current_;
    const int lane = int(f.thread.x % kWarp);
    Fiber* const warp = &fibers_[f.thread.x / kWarp * kWarp];
    if (!(mask >> lane & 1)) defect("a lane is not in its own mask");
    f.wait = Wait::lanes, f.mask = mask, f.site = site, f.gives = value, f.from = from, f.takes = ~uint64_t(0);
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      if (warp[i].done) defect("a lane of the mask has ended");
      if (warp[i].wait != Wait::lanes || warp[i].mask != mask) {
        leave();  // somebody is still on the way: the last one to come wakes this one
        return f.takes;
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      if (warp[i].site != site) defect("lanes meet in different shuffles");
      if (mask >> warp[i].from & 1) warp[i].takes = warp[warp[i].from].gives;
    }
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1) warp[i].wait = Wait::none;
    return f.takes;
  }

  [[noreturn]] void fail(const std::string& what) {
    failure_ = what + ", thread " + std::to_string(current_->thread.x);
    leave();
    std::abort();  // a failed block isn't entered again
  }

  void leave() {
#ifdef EMULATION_ASSEMBLER
    emulation_switch(&current_->stack, main_);
#else
    swapcontext(&current_->context, &main_);
#endif
  }

 private:
  static constexpr size_t kStack = 64 << 10, kGuard = 64;
  struct Aligned {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };
  struct Piece {
    std::unique_ptr<unsigned char[], Aligned> bytes;
    size_t size = 0;
  };

  static void begin() {
    Block& block = *running();
    (*block.body_)();
    block.current_->done = true;
    block.leave();
    std::abort();
  }

  void start(int i) {
    Fiber& f = fibers_[i];
    f.thread.x = unsigned(i);
#ifdef EMULATION_ASSEMBLER
    // As `emulation_switch` leaves a stack: six registers, then where to go; entered as if called (16 bytes less 8).
    const uintptr_t top = reinterpret_cast<uintptr_t>(stacks_[i].get() + kStack) / 16 * 16;
    void** words = reinterpret_cast<void**>(top) - 2;
    words[1] = nullptr;
    words[0] = reinterpret_cast<void*>(&begin);
    f.stack = words - 6;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks_[i].get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &begin, 0);
#endif
  }

  void enter(Fiber& f) {
    current_ = &f;
#ifdef EMULATION_ASSEMBLER
    emulation_switch(&main_, f.stack);
#else
    swapcontext(&main_, &f.context);
#endif
  }

  std::string stuck(unsigned number) const {
    int at_barrier = 0, at_shuffle = 0, ended = 0;
    for (const auto& f : fibers_)
      ended += f.done, at_barrier += !f.done && f.wait == Wait::block, at_shuffle += !f.done && f.wait == Wait::lanes;
    return "deadlock in block " + std::to_string(number) + ": " + std::to_string(at_barrier) +
           " threads at a barrier, " + std::to_string(at_shuffle) + " at a shuffle, " + std::to_string(ended) +
           " ended";
  }

  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
#ifdef EMULATION_ASSEMBLER
  void* main_ = nullptr;
#else
  ucontext_t main_;
#endif
  const std::function<void()>* body_ = nullptr;
  std::map<const void*, Piece> arena_;
  size_t dynamic_bytes_ = 0;
  const void* dynamic_ = nullptr;
  int arrived_ = 0;
  std::string failure_;
};

inline void defect(const std::string& what) { Block::running()->fail(what); }

inline int64_t& launches() {
  static int64_t count = 0;
  return count;
}

template <class... P, class... A>
void launch(Schedule schedule, void (*kernel)(P...), int64_t blocks, size_t shared, const A&... args) {
  if (blocks == 0) return;
  if (shared > 48 << 10) throw Defect("more than 48 KiB of shared memory");
  std::mt19937 draw(schedule.seed * 7919u + unsigned(launches()++));
  if (blocks > 0x7fffffff) throw Defect("more blocks than a grid has");
  const int64_t first = schedule.last ? std::max<int64_t>(0, blocks - schedule.last) : 0;
  std::vector<unsigned> order;
  for (int64_t i = first; i < blocks; ++i) order.push_back(unsigned(i));
  if (schedule.seed) std::shuffle(order.begin(), order.end(), draw);
  const std::function<void()> body = [&] { kernel(P(args)...); };
  static Block block;
  for (const unsigned number : order) block.run(number, shared, body, draw, schedule.seed != 0);
}

template <class T>
T shuffled(unsigned mask, T value, int from, const void* site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Block::running()->exchange(mask, from, bits, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::Block::running()->fiber().thread)
#define blockIdx (emulation::Block::running()->index)
#define __syncthreads() emulation::Block::running()->barrier()
// The address of a static is the place in the program.
#define __shfl_xor_sync(mask, value, offset)                                             \
  ([&] {                                                                                 \
    static const char site = 0;                                                          \
    const int own = int(threadIdx.x % emulation::kWarp);                                 \
    return emulation::shuffled(mask, value, (own ^ (offset)) % emulation::kWarp, &site); \
  }())
#define FA_SHARED(type, name, count) \
  static const char name##_key = 0;  \
  type* const name = static_cast<type*>(emulation::Block::running()->shared(&name##_key, sizeof(type) * (count)))
#define FA_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulation::Block::running()->dynamic())

inline float __bfloat162float(emulation::BFloat16 v) { return v; }
inline float __half2float(emulation::Half v) { return v; }
inline emulation::BFloat16 __float2bfloat16_rn(float v) { return v; }
inline emulation::Half __float2half_rn(float v) { return v; }

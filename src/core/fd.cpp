#include "core/fd.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <system_error>

#include "core/error.h"

namespace paracomm {
namespace {

// Which descriptors are ours: one bit each. A fork handler may only use memory that no lock guards, so this is an array
// of atomics; the kernel gives its pages when they are touched.
constexpr int kMaxFds = 1 << 20;
std::array<std::atomic<uint64_t>, kMaxFds / 64> owned{};
std::atomic<int> highest_owned{-1};
std::atomic<int> generation{1};

void close_all_in_child() {
  const int words = highest_owned.load(std::memory_order_relaxed) / 64;
  for (int word = 0; word <= words; ++word) {
    uint64_t bits = owned[word].exchange(0, std::memory_order_relaxed);
    for (int bit = 0; bits != 0; ++bit, bits >>= 1) {
      if (bits & 1) ::close(word * 64 + bit);
    }
  }
  generation.fetch_add(1, std::memory_order_relaxed);
}

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, close_all_in_child);

void enter(int fd) {
  if (fd >= kMaxFds) {
    ::close(fd);
    throw Error(ErrorKind::error, "descriptor " + std::to_string(fd) + " is beyond the " + std::to_string(kMaxFds) +
                                      " that paracomm can guard over fork");
  }
  owned[fd / 64].fetch_or(uint64_t{1} << (fd % 64), std::memory_order_relaxed);
  int highest = highest_owned.load(std::memory_order_relaxed);
  while (highest < fd && !highest_owned.compare_exchange_weak(highest, fd, std::memory_order_relaxed)) {
  }
}

void leave(int fd) noexcept { owned[fd / 64].fetch_and(~(uint64_t{1} << (fd % 64)), std::memory_order_relaxed); }

}  // namespace

int fork_generation() noexcept { return generation.load(std::memory_order_relaxed); }

Fd::Fd(int fd) : fd_(fd), generation_(fork_generation()) {
  if (fd_ < 0) return;
  enter(fd_);
  ::fcntl(fd_, F_SETFD, FD_CLOEXEC);
}

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
    generation_ = other.generation_;
  }
  return *this;
}

void Fd::reset() noexcept {
  if (const int fd = release(); fd >= 0) ::close(fd);
}

int Fd::release() noexcept {
  const int fd = get();
  fd_ = -1;
  if (fd >= 0) leave(fd);
  return fd;
}

std::string descriptor_limit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return "this process may have " + std::to_string(limit.rlim_cur) + " descriptors open (ulimit -n)";
}

std::string system_message(const std::string& what, int error) {
  const std::string text = what + ": " + std::generic_category().message(error);
  return error == EMFILE ? text + "; " + descriptor_limit() : text;
}

Fd checked_fd(int fd, const std::string& what) {
  if (fd < 0) throw Error(ErrorKind::error, system_message(what, errno));
  return Fd(fd);
}

Fd make_eventfd() { return checked_fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"); }

Fd make_memfd(const char* name, size_t nbytes) {
  Fd fd = checked_fd(::memfd_create(name, MFD_CLOEXEC), "memfd_create");
  if (::ftruncate(fd.get(), static_cast<off_t>(nbytes)) != 0) {
    throw Error(ErrorKind::error,
                system_message("sizing shared memory to " + std::to_string(nbytes) + " bytes", errno));
  }
  return fd;
}

void set_nonblocking(const Fd& fd, bool on) {
  const int flags = ::fcntl(fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) != 0) {
    throw Error(ErrorKind::error, system_message("fcntl", errno));
  }
}

}  // namespace paracomm

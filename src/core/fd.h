// File descriptors that we own: closed on destruction, never inherited by exec, and closed in forked children.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

namespace paracomm {

/// How often this process descends by fork from the one that loaded the library, plus one. An object that remembers
/// another value was made by a parent: its threads do not exist here and its descriptors are closed.
int fork_generation() noexcept;

/// Owns one descriptor. A forked child (a data-loader worker) closes all of them at once, or else peers would never see
/// the end of a killed parent's connections; there `get()` is -1 and destruction does nothing.
class Fd {
 public:
  Fd() = default;
  /// Adopts `fd` (nothing if it is negative) and sets close-on-exec.
  explicit Fd(int fd);
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)), generation_(other.generation_) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd() { reset(); }

  int get() const noexcept { return generation_ == fork_generation() ? fd_ : -1; }
  explicit operator bool() const noexcept { return get() >= 0; }
  void reset() noexcept;
  /// Gives the descriptor up to the caller, who closes it; a forked child keeps it open.
  int release() noexcept;

 private:
  int fd_ = -1;
  int generation_ = 0;
};

/// Adopts what a system call returned; throws Error(error) "WHAT: No such file" if it is negative.
Fd checked_fd(int fd, const std::string& what);
/// "this process may have 256 descriptors open (ulimit -n)".
std::string descriptor_limit();
/// "WHAT: Connection refused", from `error` (an errno value); where descriptors have run out, with their limit.
std::string system_message(const std::string& what, int error);
/// A non-blocking eventfd at zero.
Fd make_eventfd();
/// An anonymous file of `nbytes` zero bytes that no name leads to.
Fd make_memfd(const char* name, size_t nbytes);
void set_nonblocking(const Fd& fd, bool on);

}  // namespace paracomm

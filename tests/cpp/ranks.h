// Runs a function on N ranks: threads, or forked processes that exchange bytes through the parent.
#pragma once

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace paracomm_test {

/// Returns when all have; what one throws fails the test.
template <class Function>
void run_threads(int n, Function function) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank)
    threads.emplace_back([&function, rank] {
      try {
        function(rank);
      } catch (const std::exception& error) {
        fail(__FILE__, __LINE__, "rank " + std::to_string(rank) + ": " + error.what());
      }
    });
  for (std::thread& thread : threads) thread.join();
}

inline void write_all(int fd, const void* data, size_t nbytes) {
  for (size_t at = 0; at < nbytes;) {
    const ssize_t n = ::send(fd, static_cast<const char*>(data) + at, nbytes - at, MSG_NOSIGNAL);
    CHECK(n > 0);
    at += static_cast<size_t>(n);
  }
}
/// False: the other end is closed.
inline bool read_all(int fd, void* data, size_t nbytes) {
  for (size_t at = 0; at < nbytes;) {
    const ssize_t n = ::read(fd, static_cast<char*>(data) + at, nbytes - at);
    if (n <= 0) return false;
    at += static_cast<size_t>(n);
  }
  return true;
}
inline void write_blob(int fd, const std::string& blob) {
  const uint64_t size = blob.size();
  write_all(fd, &size, sizeof size);
  write_all(fd, blob.data(), blob.size());
}
inline bool read_blob(int fd, std::string& blob) {
  uint64_t size = 0;
  if (!read_all(fd, &size, sizeof size)) return false;
  blob.resize(size);
  return read_all(fd, blob.data(), size);
}

/// What a forked rank is given.
struct Process {
  int rank = 0, world_size = 0, parent = -1;

  /// Everyone's bytes in rank order; all ranks call it.
  std::vector<std::string> exchange(const std::string& mine) const {
    write_blob(parent, mine);
    std::vector<std::string> blobs(static_cast<size_t>(world_size));
    for (std::string& blob : blobs) CHECK(read_blob(parent, blob));
    return blobs;
  }
};

/// Returns the wait statuses by rank. The parent must have no threads. Ranks named in `mortal` may die.
inline std::vector<int> run_processes(int n, const std::function<void(const Process&)>& function,
                                      const std::vector<int>& mortal = {}) {
  std::vector<int> ours, pids;
  std::fflush(nullptr);
  for (int rank = 0; rank < n; ++rank) {
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    const pid_t pid = ::fork();
    CHECK(pid >= 0);
    if (pid == 0) {
      for (const int fd : ours) ::close(fd);
      ::close(ends[0]);
      try {
        function({rank, n, ends[1]});
      } catch (const std::exception& error) {
        fail(__FILE__, __LINE__, "rank " + std::to_string(rank) + ": " + error.what());
      }
      ::_exit(0);
    }
    ::close(ends[1]);
    ours.push_back(ends[0]);
    pids.push_back(pid);
  }
  // Rounds of exchanges, until the ranks are through with them.
  for (bool open = true; open;) {
    std::vector<std::string> blobs(ours.size());
    for (size_t r = 0; r < ours.size() && open; ++r) open = read_blob(ours[r], blobs[r]);
    for (size_t r = 0; r < ours.size() && open; ++r)
      for (const std::string& blob : blobs) write_blob(ours[r], blob);
  }
  std::vector<int> statuses(ours.size());
  for (size_t r = 0; r < ours.size(); ++r) {
    CHECK_EQ(::waitpid(pids[r], &statuses[r], 0), pids[r]);
    ::close(ours[r]);
    bool may_die = false;
    for (const int rank : mortal) may_die |= rank == static_cast<int>(r);
    if (statuses[r] != 0 && !may_die)
      fail(__FILE__, __LINE__, "rank " + std::to_string(r) + " ended with status " + std::to_string(statuses[r]));
  }
  return statuses;
}

}  // namespace paracomm_test

// What a rank publishes at bootstrap so that its peers can reach it and prove that they belong to the same job.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/sha256.h"

namespace paracomm {

struct Address {
  std::string
      host_id;  ///< equal on two ranks: they share a kernel and a network namespace, hence memory and Unix sockets
  std::string hostname;  ///< for messages to people
  int32_t pid = 0;
  int32_t cpu_count = 0;  ///< CPUs that this process may use
  std::string unix_name;  ///< abstract Unix socket, without the leading zero byte
  std::string ip;         ///< IPv4 or IPv6 in text, without a scope
  uint16_t port = 0;
  Digest secret{};  ///< the job's secret is rank 0's

  /// A versioned blob of bytes.
  std::string serialise() const;
  /// Throws Error(invalid_argument) for anything that `serialise` of this version did not make.
  static Address parse(std::string_view blob);
  /// "hostB (10.0.0.2:4711)".
  std::string describe() const;

  friend bool operator==(const Address&, const Address&) = default;
};

/// CPUs that this process may run on, at least one.
int usable_cpus();

/// Host, process and CPUs filled in; `host_id` empty means: find it out.
Address local_address(const std::string& host_id = "");

}  // namespace paracomm

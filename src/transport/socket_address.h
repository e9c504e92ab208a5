// A sockaddr of any family, and the socket options that every connection of ours has.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/fd.h"

namespace paracomm {

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;

  /// An abstract Unix socket: no file, gone with its last descriptor.
  static SocketAddress unix_name(const std::string& name);
  /// nullopt if `ip` is no IPv4 or IPv6 address. `scope_id` matters to link-local IPv6 only.
  static std::optional<SocketAddress> parse_ip(const std::string& ip, uint16_t port, unsigned scope_id = 0);
  /// The local end of a socket.
  static SocketAddress of_socket(const Fd& socket);

  int family() const noexcept { return storage.ss_family; }
  const sockaddr* get() const noexcept { return reinterpret_cast<const sockaddr*>(&storage); }
  sockaddr* get() noexcept { return reinterpret_cast<sockaddr*>(&storage); }
  std::string ip() const;
  uint16_t port() const noexcept;
  unsigned scope_id() const noexcept;
  bool is_link_local() const noexcept;
};

/// A non-blocking stream socket; TCP without Nagle's delay.
Fd make_stream_socket(int family);
void set_option(const Fd& socket, int level, int option, int value) noexcept;

}  // namespace paracomm

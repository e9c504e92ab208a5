#include "transport/socket_address.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "core/error.h"

namespace paracomm {
namespace {

const sockaddr_in& as_v4(const SocketAddress& address) { return reinterpret_cast<const sockaddr_in&>(address.storage); }
const sockaddr_in6& as_v6(const SocketAddress& address) {
  return reinterpret_cast<const sockaddr_in6&>(address.storage);
}

}  // namespace

SocketAddress SocketAddress::unix_name(const std::string& name) {
  SocketAddress address;
  auto& un = reinterpret_cast<sockaddr_un&>(address.storage);
  un.sun_family = AF_UNIX;
  const size_t n = std::min(name.size(), sizeof un.sun_path - 1);
  std::memcpy(un.sun_path + 1, name.data(), n);
  address.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + n);
  return address;
}

std::optional<SocketAddress> SocketAddress::parse_ip(const std::string& ip, uint16_t port, unsigned scope_id) {
  SocketAddress address;
  auto& v4 = reinterpret_cast<sockaddr_in&>(address.storage);
  if (::inet_pton(AF_INET, ip.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(port);
    address.length = sizeof v4;
    return address;
  }
  address = {};
  auto& v6 = reinterpret_cast<sockaddr_in6&>(address.storage);
  if (::inet_pton(AF_INET6, ip.c_str(), &v6.sin6_addr) != 1) return std::nullopt;
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(port);
  address.length = sizeof v6;
  if (address.is_link_local()) v6.sin6_scope_id = scope_id;
  return address;
}

SocketAddress SocketAddress::of_socket(const Fd& socket) {
  SocketAddress address;
  address.length = sizeof address.storage;
  if (::getsockname(socket.get(), address.get(), &address.length) != 0) {
    throw Error(ErrorKind::error, system_message("getsockname", errno));
  }
  return address;
}

std::string SocketAddress::ip() const {
  char text[INET6_ADDRSTRLEN] = {};
  const void* number = family() == AF_INET ? static_cast<const void*>(&as_v4(*this).sin_addr)
                                           : static_cast<const void*>(&as_v6(*this).sin6_addr);
  ::inet_ntop(family(), number, text, sizeof text);
  return text;
}

uint16_t SocketAddress::port() const noexcept {
  return ntohs(family() == AF_INET ? as_v4(*this).sin_port : as_v6(*this).sin6_port);
}

unsigned SocketAddress::scope_id() const noexcept { return family() == AF_INET6 ? as_v6(*this).sin6_scope_id : 0; }

bool SocketAddress::is_link_local() const noexcept {
  return family() == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&as_v6(*this).sin6_addr);
}

Fd make_stream_socket(int family) {
  Fd socket = checked_fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), "opening a socket");
  if (family != AF_UNIX) set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  return socket;
}

void set_option(const Fd& socket, int level, int option, int value) noexcept {
  ::setsockopt(socket.get(), level, option, &value, sizeof value);
}

}  // namespace paracomm

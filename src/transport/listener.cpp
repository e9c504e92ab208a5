#include "transport/listener.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "core/error.h"
#include "transport/mesh.h"
#include "transport/socket_address.h"

namespace paracomm {
namespace {

constexpr char kFdTag = 'F';

/// The address of a named interface: IPv4 before IPv6, global before link-local; of `family` if that is not AF_UNSPEC.
SocketAddress address_of_interface(const std::string& name, int family) {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) throw Error(ErrorKind::error, system_message("getifaddrs", errno));
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(list, ::freeifaddrs);
  SocketAddress best;
  int best_score = 0;
  std::string known;
  for (const ifaddrs* entry = list; entry; entry = entry->ifa_next) {
    if (!entry->ifa_addr || (entry->ifa_addr->sa_family != AF_INET && entry->ifa_addr->sa_family != AF_INET6)) continue;
    if (known.find(std::string(" ") + entry->ifa_name) == std::string::npos)
      known += std::string(" ") + entry->ifa_name;
    if (name != entry->ifa_name) continue;
    SocketAddress address;
    address.length = entry->ifa_addr->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&address.storage, entry->ifa_addr, address.length);
    if (family != AF_UNSPEC && address.family() != family) continue;
    const int score = address.family() == AF_INET ? 3 : address.is_link_local() ? 1 : 2;
    if (score > best_score) best = address, best_score = score;
  }
  if (best_score == 0) {
    throw Error(ErrorKind::invalid_argument,
                "network interface '" + name + "' does not exist here or has no IP address; there are:" + known);
  }
  return best;
}

/// The local address from which packets to `host` start. Nothing is sent.
SocketAddress address_towards(const std::string& host) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* list = nullptr;
  if (const int failure = ::getaddrinfo(host.c_str(), "9", &hints, &list); failure != 0) {
    const std::string what = "master address '" + host + "'";
    throw Error(ErrorKind::invalid_argument,
                failure == EAI_SYSTEM ? system_message(what, errno) : what + ": " + ::gai_strerror(failure));
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(list, ::freeaddrinfo);
  int error = 0;
  for (const addrinfo* entry = list; entry; entry = entry->ai_next) {
    const Fd socket = checked_fd(::socket(entry->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0), "opening a socket");
    if (::connect(socket.get(), entry->ai_addr, entry->ai_addrlen) == 0) return SocketAddress::of_socket(socket);
    error = errno;
  }
  throw Error(ErrorKind::invalid_argument, system_message("no route to the master address '" + host + "'", error));
}

SocketAddress choose_address(const ListenerOptions& options) {
  if (options.interface.empty()) {
    return options.master_address.empty() ? *SocketAddress::parse_ip("127.0.0.1", 0)
                                          : address_towards(options.master_address);
  }
  const size_t percent = options.interface.find('%');
  const unsigned scope = percent == std::string::npos ? 0 : ::if_nametoindex(options.interface.c_str() + percent + 1);
  if (const auto given = SocketAddress::parse_ip(options.interface.substr(0, percent), 0, scope)) return *given;
  const auto master = SocketAddress::parse_ip(options.master_address, 0);
  return address_of_interface(options.interface, master ? master->family() : AF_UNSPEC);
}

Fd listen_on(const SocketAddress& address, int backlog, const std::string& what) {
  Fd socket = make_stream_socket(address.family());
  if (::bind(socket.get(), address.get(), address.length) != 0 || ::listen(socket.get(), backlog) != 0) {
    throw Error(ErrorKind::invalid_argument, system_message("listening on " + what, errno));
  }
  return socket;
}

std::string random_name() {
  std::array<uint8_t, 16> bytes;
  random_bytes(bytes);
  std::string name = "paracomm-";
  for (const uint8_t byte : bytes) {
    name += "0123456789abcdef"[byte >> 4];
    name += "0123456789abcdef"[byte & 15];
  }
  return name;
}

void wait_for(const Fd& socket, short events, Deadline deadline, const char* what) {
  pollfd polled{socket.get(), events, 0};
  for (;;) {
    const int ready = ::poll(&polled, 1, deadline.poll_ms());
    if (ready > 0) return;
    if (ready < 0 && errno != EINTR) throw Error(ErrorKind::error, system_message("poll", errno));
    if (deadline.expired()) throw Error(ErrorKind::timeout, std::string(what) + " timed out");
  }
}

}  // namespace

Listener::Listener(ListenerOptions options) : options_(std::move(options)), address_(local_address(options_.host_id)) {
  address_.unix_name = random_name();
  unix_socket_ = listen_on(SocketAddress::unix_name(address_.unix_name), options_.backlog, "a Unix socket");
  SocketAddress own = choose_address(options_);
  if (own.family() == AF_INET) {
    reinterpret_cast<sockaddr_in&>(own.storage).sin_port = 0;
  } else {
    reinterpret_cast<sockaddr_in6&>(own.storage).sin6_port = 0;
  }
  tcp_socket_ = listen_on(own, options_.backlog, own.ip());
  address_.ip = own.ip();
  address_.port = SocketAddress::of_socket(tcp_socket_).port();
  scope_id_ = own.scope_id();
  random_bytes(address_.secret);
}

std::vector<PeerSockets> Listener::connect(int rank, const std::vector<std::string>& blobs, Deadline deadline,
                                           int sockets_per_peer) {
  std::vector<Address> addresses;
  for (const std::string& blob : blobs) addresses.push_back(Address::parse(blob));
  if (rank < 0 || rank >= static_cast<int>(addresses.size()) || !(addresses[rank] == address_)) {
    throw Error(ErrorKind::invalid_argument, "connect: blob " + std::to_string(rank) + " of " +
                                                 std::to_string(addresses.size()) + " is not what this rank published");
  }
  if (sockets_per_peer < 1 || sockets_per_peer > 64) {
    throw Error(ErrorKind::invalid_argument,
                "sockets_per_peer is " + std::to_string(sockets_per_peer) + ", not 1 to 64");
  }
  if (!unix_socket_) throw Error(ErrorKind::invalid_argument, "connect: this listener is closed");
  const Fd unix_socket = std::move(unix_socket_), tcp_socket = std::move(tcp_socket_);
  return Mesh(rank, std::move(addresses), options_, scope_id_, sockets_per_peer)
      .connect(unix_socket, tcp_socket, deadline);
}

void send_fd(const Fd& socket, int fd, Deadline deadline) {
  char tag = kFdTag;
  iovec part{&tag, 1};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = space;
  message.msg_controllen = sizeof space;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  for (;;) {
    if (::sendmsg(socket.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) == 1) return;
    if (errno == EPIPE || errno == ECONNRESET) {
      throw Error(ErrorKind::peer_lost, system_message("passing a descriptor", errno));
    }
    if (errno != EAGAIN && errno != EINTR) {
      throw Error(ErrorKind::error, system_message("passing a descriptor", errno));
    }
    wait_for(socket, POLLOUT, deadline, "passing a descriptor");
  }
}

Fd recv_fd(const Fd& socket, Deadline deadline) {
  for (;;) {
    wait_for(socket, POLLIN, deadline, "waiting for a descriptor");
    char tag = 0;
    iovec part{&tag, 1};
    alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = space;
    message.msg_controllen = sizeof space;
    const ssize_t n = ::recvmsg(socket.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) {
      throw Error(ErrorKind::peer_lost, n == 0 ? "the peer closed the connection before it passed a descriptor"
                                               : system_message("waiting for a descriptor", errno));
    }
    const cmsghdr* header = CMSG_FIRSTHDR(&message);
    Fd received;
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
      received = Fd(fd);
    }
    // The kernel drops a descriptor that there is no room for, and says no more than this.
    if (tag == kFdTag && !received && (message.msg_flags & MSG_CTRUNC) != 0)
      throw Error(ErrorKind::error, "a peer passed a descriptor and there is no room for it: " + descriptor_limit());
    if (tag != kFdTag || !received) throw Error(ErrorKind::security, "expected a descriptor, got other bytes");
    return received;
  }
}

}  // namespace paracomm

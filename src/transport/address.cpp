#include "transport/address.h"

#include <arpa/inet.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "core/error.h"
#include "core/text.h"

namespace paracomm {
namespace {

constexpr std::string_view kMagic = "paracomm address 1\n";
constexpr size_t kMaxText = 255;

void put_number(std::string& out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift));
}

void put_text(std::string& out, const std::string& text) {
  const std::string kept = cut_text(text, kMaxText);
  put_number(out, static_cast<uint32_t>(kept.size()));
  out += kept;
}

/// Takes fields off the front of a blob; too few bytes are an error.
class Reader {
 public:
  explicit Reader(std::string_view rest) : rest_(rest) {}

  std::string_view take(size_t n) {
    if (n > rest_.size()) throw_invalid("it ends too early");
    const std::string_view field = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return field;
  }
  uint32_t number() {
    uint32_t value = 0;
    for (const char byte : take(4)) value = value << 8 | static_cast<uint8_t>(byte);
    return value;
  }
  std::string text() {
    const uint32_t n = number();
    if (n > kMaxText) throw_invalid("a text field claims " + std::to_string(n) + " bytes");
    return std::string(take(n));
  }
  bool empty() const { return rest_.empty(); }

  [[noreturn]] static void throw_invalid(const std::string& why) {
    throw Error(ErrorKind::invalid_argument, "not an address that this version of paracomm published: " + why);
  }

 private:
  std::string_view rest_;
};

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string find_host_id(const std::string& hostname) {
  const std::string boot = first_line("/proc/sys/kernel/random/boot_id");
  struct stat space{};
  const bool known = ::stat("/proc/self/ns/net", &space) == 0;
  return (boot.empty() ? hostname : boot) + "/" + (known ? std::to_string(space.st_ino) : "?");
}

}  // namespace

int usable_cpus() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN)));
}

std::string Address::serialise() const {
  std::string out(kMagic);
  put_text(out, host_id);
  put_text(out, hostname);
  put_number(out, static_cast<uint32_t>(pid));
  put_number(out, static_cast<uint32_t>(cpu_count));
  put_text(out, unix_name);
  put_text(out, ip);
  put_number(out, port);
  out.append(reinterpret_cast<const char*>(secret.data()), secret.size());
  return out;
}

Address Address::parse(std::string_view blob) {
  if (blob.substr(0, kMagic.size()) != kMagic) Reader::throw_invalid("it starts otherwise");
  Reader in(blob.substr(kMagic.size()));
  Address address;
  address.host_id = in.text();
  address.hostname = in.text();
  address.pid = static_cast<int32_t>(in.number());
  address.cpu_count = static_cast<int32_t>(in.number());
  address.unix_name = in.text();
  address.ip = in.text();
  const uint32_t port = in.number();
  std::memcpy(address.secret.data(), in.take(address.secret.size()).data(), address.secret.size());
  if (!in.empty()) Reader::throw_invalid("bytes follow it");
  if (port == 0 || port > 65535) Reader::throw_invalid("port " + std::to_string(port));
  address.port = static_cast<uint16_t>(port);
  // An abstract name fills sun_path after its leading zero byte, at most.
  if (address.unix_name.empty() || address.unix_name.size() > 100)
    Reader::throw_invalid("its Unix socket has no usable name");
  in6_addr number;
  if (::inet_pton(AF_INET, address.ip.c_str(), &number) != 1 &&
      ::inet_pton(AF_INET6, address.ip.c_str(), &number) != 1) {
    Reader::throw_invalid("'" + address.ip + "' is no IP address");
  }
  return address;
}

std::string Address::describe() const {
  const bool v6 = ip.find(':') != std::string::npos;
  return hostname + " (" + (v6 ? "[" + ip + "]" : ip) + ":" + std::to_string(port) + ")";
}

Address local_address(const std::string& host_id) {
  Address address;
  char hostname[256] = {};
  ::gethostname(hostname, sizeof hostname - 1);
  address.hostname = hostname;
  address.host_id = host_id.empty() ? find_host_id(address.hostname) : host_id;
  if (address.host_id.size() > kMaxText) {
    throw Error(ErrorKind::invalid_argument, "host_id is longer than " + std::to_string(kMaxText) + " bytes");
  }
  address.pid = ::getpid();
  address.cpu_count = usable_cpus();
  return address;
}

}  // namespace paracomm

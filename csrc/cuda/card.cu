#include "cuda/card.h"

#include <unistd.h>

#include <cstring>
#include <random>

#include "cuda/handles.h"

namespace paracomm::PARACOMM_DEVICE_NAMESPACE {
namespace {

#if defined(PARACOMM_EMULATED)
constexpr char kMagic[] = "PCemu01";
#else
constexpr char kMagic[] = "PCgpu01";
#endif

/// Equal in one process only; a forked child has another id.
uint64_t process_number() {
  static const uint64_t number = [] {
    std::random_device random;
    return static_cast<uint64_t>(random()) << 32 | random();
  }();
  return number;
}

/// Peers of one process share pointers, not handles.
std::byte* open_own(const Card& card, int device) {
  if (card.device == device) return card.memory;
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, device, card.device), "cudaDeviceCanAccessPeer");
  if (can == 0)
    throw Error(ErrorKind::invalid_argument,
                "device " + std::to_string(device) + " has no peer access to device " + std::to_string(card.device));
  const cudaError_t result = cudaDeviceEnablePeerAccess(card.device, 0);
  if (result == cudaErrorPeerAccessAlreadyEnabled)
    cudaGetLastError();
  else
    check(result, "cudaDeviceEnablePeerAccess");
  return card.memory;
}

}  // namespace

Card Card::of(int device, const Layout& layout, std::byte* memory) {
  Card card{};
  std::memcpy(card.magic, kMagic, sizeof card.magic);
  card.process[0] = process_number();
  card.process[1] = static_cast<uint64_t>(::getpid());
  card.device = device;
  card.layout = layout;
  card.memory = memory;
  check(cudaIpcGetMemHandle(&card.handle, memory), "cudaIpcGetMemHandle");
  return card;
}

Card Card::parse(const std::string& text) {
  Card card{};
  const bool whole = text.size() == sizeof card;
  if (whole) std::memcpy(&card, text.data(), sizeof card);
  if (!whole || std::memcmp(card.magic, kMagic, sizeof card.magic) != 0)
    throw Error(ErrorKind::mismatch, "a peer published no card of this version for this kind of device");
  return card;
}

void Card::check_fits(const Layout& own, const std::string& who) const {
  const auto differ = [&](const char* what, size_t here, size_t there) {
    if (here != there)
      throw Error(ErrorKind::mismatch, std::string("device option ") + what + " is " + std::to_string(here) +
                                           " here, " + std::to_string(there) + " on " + who);
  };
  differ("world_size", static_cast<size_t>(own.world_size), static_cast<size_t>(layout.world_size));
  differ("channels", static_cast<size_t>(own.channels), static_cast<size_t>(layout.channels));
  differ("shot_blocks", static_cast<size_t>(own.shot_blocks), static_cast<size_t>(layout.shot_blocks));
  differ("ring_bytes", own.ring_bytes, layout.ring_bytes);
  differ("staging_bytes", own.staging_bytes, layout.staging_bytes);
}

std::byte* Card::open(int on_device, std::vector<void*>& opened) const {
  if (process[0] == process_number() && process[1] == static_cast<uint64_t>(::getpid()))
    return open_own(*this, on_device);
  void* mapped = nullptr;
  check(cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
  opened.push_back(mapped);
  return static_cast<std::byte*>(mapped);
}

}  // namespace paracomm::PARACOMM_DEVICE_NAMESPACE

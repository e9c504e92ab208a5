// Two ranks push and pull at once over TCP, as a ring all-reduce of two does: what the transport alone allows.
//
//   bench_tcp RANK DIRECTORY MASTER_IP SOCKETS MESSAGE_KIB TOTAL_MIB ITERATIONS
//
// Both ranks meet through files in an empty DIRECTORY that they share.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include <time.h>

#include "check.h"
#include "transport/listener.h"
#include "transport/tcp.h"

using namespace paracomm;

namespace {

std::string meet(const std::string& directory, int rank, const std::string& own) {
  const std::string mine = directory + "/" + std::to_string(rank), theirs = directory + "/" + std::to_string(1 - rank);
  std::ofstream(mine + ".part", std::ios::binary) << own;
  std::filesystem::rename(mine + ".part", mine);
  while (!std::filesystem::exists(theirs)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::ifstream in(theirs, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void exchange(TcpEndpoint& tcp, int peer, std::vector<std::byte>& out, std::vector<std::byte>& in, size_t step) {
  const Signature signature;
  size_t sent = 0, received = 0;
  uint64_t index = 0;
  const auto size_at = [&](size_t at) { return std::min(step, out.size() - at); };
  while (received < in.size() || sent < out.size() || !tcp.sent(peer, index)) {
    bool moved = false;
    while (sent < out.size() && tcp.try_send(peer, signature, out.data() + sent, size_at(sent), index)) {
      sent += size_at(sent);
      moved = true;
    }
    while (received < in.size() && tcp.try_recv(peer, signature, size_at(received), in.data() + received)) {
      received += size_at(received);
      tcp.release(peer);
      tcp.progress();
      moved = true;
    }
    if (moved) continue;
    tcp.progress();
    tcp.wait(peer, std::chrono::seconds(1));
  }
}

double cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return std::fprintf(stderr, "see the head of bench_tcp.cpp\n"), 2;
  const int rank = std::atoi(argv[1]), sockets = std::atoi(argv[4]), iterations = std::atoi(argv[7]);
  const size_t step = static_cast<size_t>(std::atof(argv[5]) * 1024);
  const size_t total = static_cast<size_t>(std::atof(argv[6]) * 1048576);
  Listener listener({.master_address = argv[3], .host_id = std::to_string(rank)});
  std::vector<std::string> blobs(2);
  blobs[rank] = listener.publish();
  blobs[1 - rank] = meet(argv[2], rank, blobs[rank]);
  auto peers = listener.connect(rank, blobs, Deadline::after(10), sockets);
  std::vector<TcpPeer> links;
  links.push_back({1 - rank, peers[0].hostname, std::move(peers[0].data)});
  TcpEndpoint tcp(rank, 2, std::move(links));
  std::vector<std::byte> out(total, std::byte{1}), in(total);
  exchange(tcp, 1 - rank, out, in, step);
  std::vector<double> times;
  const double cpu = cpu_seconds();
  for (int i = 0; i < iterations; ++i) {
    const auto start = std::chrono::steady_clock::now();
    exchange(tcp, 1 - rank, out, in, step);
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2];
  if (rank == 0) {
    std::printf("%d sockets, %zu B messages: %.3f ms (best %.3f), %.3f GB/s each way, %.0f %% cpu\n", sockets, step,
                median * 1e3, times[0] * 1e3, static_cast<double>(total) / median / 1e9,
                100 * (cpu_seconds() - cpu) / (median * iterations));
  }
}

// Runs a fuzz target without a fuzzer: every file of its corpus, then mutations of them for a while. As a canary, the
// driver checks that what it feeds differs from run to run of the mutator.
//   smoke CORPUS_FOLDER [RUNS]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <string_view>
#include <unordered_set>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Input = std::vector<std::uint8_t>;

Input mutate(const std::vector<Input>& corpus, std::mt19937_64& random) {
  Input out = corpus[random() % corpus.size()];
  if (random() % 4 == 0) {
    const Input& other = corpus[random() % corpus.size()];
    out.insert(out.begin() + static_cast<long>(random() % (out.size() + 1)), other.begin(), other.end());
  }
  const auto changes = 1 + random() % 16;
  for (std::uint64_t i = 0; i < changes; ++i) {
    if (out.empty() || random() % 4 == 0) {
      out.insert(out.begin() + static_cast<long>(random() % (out.size() + 1)), static_cast<std::uint8_t>(random()));
    } else if (random() % 5 == 0) {
      out.erase(out.begin() + static_cast<long>(random() % out.size()));
    } else {
      out[random() % out.size()] = static_cast<std::uint8_t>(random());
    }
  }
  if (out.size() > 4096) out.resize(4096);
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS_FOLDER [RUNS]\n", argv[0]);
    return 2;
  }
  std::vector<Input> corpus;
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator{argv[1], error}) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (const auto& path : files) {
    std::ifstream file{path, std::ios::binary};
    corpus.emplace_back(std::istreambuf_iterator<char>{file}, std::istreambuf_iterator<char>{});
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "%s: no corpus there\n", argv[1]);
    return 1;
  }
  for (const Input& input : corpus) LLVMFuzzerTestOneInput(input.data(), input.size());
  const char* given = std::getenv("IOVANE_SEED");
  const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  std::fprintf(stderr, "IOVANE_SEED=%llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random{seed};
  const long runs = argc > 2 ? std::strtol(argv[2], nullptr, 10) : 2000;
  std::unordered_set<std::size_t> seen;  // hashes
  for (long i = 0; i < runs; ++i) {
    const Input input = mutate(corpus, random);
    if (i < 100)
      seen.insert(std::hash<std::string_view>{}({reinterpret_cast<const char*>(input.data()), input.size()}));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  if (runs >= 100 && seen.size() < 50) {
    std::fprintf(stderr, "the mutator repeats itself\n");
    return 1;
  }
  std::printf("%zu files, %ld mutations\n", corpus.size(), runs);
  return 0;
}

#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace vtts {
namespace {

// How long a thread polls before it sleeps. The operations of one decoding step follow each other
// within 5 to 30 us. Longer costs where cores are shared: with another process on one of two cores
// the layers of a token took 14 ms, with 400 us 18.
constexpr auto kSpin = std::chrono::microseconds(50);

void relax() {
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

template <typename Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// A thread that waits for jobs. A job is offered; the thread takes it (then the caller waits for
// its end) or the caller takes it back (a core that is busy elsewhere delays no caller).
class Worker {
 public:
  Worker() : thread_([this] { loop(); }) { thread_.detach(); }

  void offer(const std::function<void()>& job) {
    job_ = &job;
    set(kOffered);
  }

  void take_back_or_wait() {
    int offered = kOffered;
    if (state_.compare_exchange_strong(offered, kIdle)) return;
    const auto idle = [this] { return state_ == kIdle; };
    if (spin_until(idle)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, idle);
  }

 private:
  enum State { kIdle, kOffered, kRunning };

  void set(State state) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_ = state;
    }
    changed_.notify_one();  // the caller waits for kIdle only, the thread for kOffered only
  }

  void loop() {
    const auto offered = [this] { return state_ == kOffered; };
    for (;;) {
      if (!spin_until(offered)) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, offered);
      }
      int expected = kOffered;
      if (!state_.compare_exchange_strong(expected, kRunning)) continue;
      (*job_)();
      set(kIdle);
    }
  }

  std::atomic<int> state_{kIdle};
  const std::function<void()>* job_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::thread thread_;  // last: it uses the others
};

struct Pool {
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  std::vector<std::unique_ptr<Worker>> workers;

  // The system may give fewer threads: those there are share the tasks.
  int grow_to(int num_workers) {
    try {
      workers.reserve(num_workers);
      while (static_cast<int>(workers.size()) < num_workers) {
        workers.push_back(std::make_unique<Worker>());
      }
    } catch (const std::exception&) {
    }
    return std::min(num_workers, static_cast<int>(workers.size()));
  }
};

// Never destroyed: its threads may outlive static objects. A forked child has none of the threads,
// and locks may be held by them: it gets a new pool and leaves the old one alone.
std::atomic<Pool*> current_pool{nullptr};
std::atomic<bool> forked{false};

Pool& pool() {
  static const bool prepared = [] {
    current_pool = new Pool;
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] {
      current_pool = new Pool;
      forked = true;
    });
#endif
    return true;
  }();
  static_cast<void>(prepared);
  return *current_pool;
}

// GOMP_parallel(function, data, num_threads, flags), of GNU's runtime; LLVM's and Intel's have it
// too.
using OpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The process's own OpenMP team, or null: without one, and in a forked child, whose team's threads
// were the parent's.
OpenMp openmp() {
#ifndef _WIN32
  static const OpenMp found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
#else
  return nullptr;
#endif
}

}  // namespace

void prepare_for_fork() { pool(); }

void parallel_for(size_t num_tasks, int num_threads,
                  const std::function<void(int worker, size_t i)>& task) {
  std::atomic<size_t> next{0};
  std::atomic<int> next_worker{0};
  std::exception_ptr error;
  std::mutex error_mutex;

  const std::function<void()> work = [&] {
    const int worker = next_worker++;
    try {
      for (size_t i = next++; i < num_tasks; i = next++) task(worker, i);
    } catch (...) {
      next = num_tasks;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };

  const auto most = std::min(static_cast<size_t>(std::max(num_threads, 1)), num_tasks);
  Pool& kept = pool();
  if (const OpenMp run = most > 1 ? openmp() : nullptr; run != nullptr) {
    // Always as many threads as torch has: GNU's runtime ends those that a smaller team leaves out,
    // and starts them anew.
    run([](void* data) { (*static_cast<const std::function<void()>*>(data))(); },
        const_cast<std::function<void()>*>(&work), static_cast<unsigned>(num_threads), 0);
  } else if (most > 1 && !kept.taken.test_and_set(std::memory_order_acquire)) {
    const int num_workers = kept.grow_to(static_cast<int>(most) - 1);
    for (int i = 0; i < num_workers; ++i) kept.workers[i]->offer(work);
    work();
    for (int i = 0; i < num_workers; ++i) kept.workers[i]->take_back_or_wait();
    kept.taken.clear(std::memory_order_release);
  } else {
    work();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace vtts

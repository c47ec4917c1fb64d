#include "core/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace vtts {

void parallel_for(size_t num_tasks, int num_threads,
                  const std::function<void(int worker, size_t i)>& task) {
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;

  const auto work = [&](int worker) {
    try {
      for (size_t i = next++; i < num_tasks; i = next++) task(worker, i);
    } catch (...) {
      next = num_tasks;
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };

  std::vector<std::thread> threads;
  for (int worker = 1; worker < num_threads && static_cast<size_t>(worker) < num_tasks; ++worker) {
    try {
      threads.emplace_back(work, worker);
    } catch (const std::system_error&) {
      break;  // the system gives no more threads: those that run share the tasks
    }
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace vtts

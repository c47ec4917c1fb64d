// A loop over tasks on a few threads.
#pragma once

#include <cstddef>
#include <functional>

namespace vtts {

// Runs task(worker, i) for every i < num_tasks; worker < num_threads names the thread, so that it
// can own scratch memory. The caller is worker 0. Threads live for this call only (about 20 us
// each): nothing survives into a forked data worker. The first exception of a task is rethrown
// after all threads have stopped.
void parallel_for(size_t num_tasks, int num_threads,
                  const std::function<void(int worker, size_t i)>& task);

}  // namespace vtts

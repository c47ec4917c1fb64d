// A loop over tasks on a few threads.
#pragma once

#include <cstddef>
#include <functional>

namespace vtts {

// Runs task(worker, i) for every i < num_tasks; worker < num_threads names the thread, so that it
// can own scratch memory. The caller is worker 0. The first exception of a task is rethrown after
// all threads have stopped.
//
// The other threads are kept: starting one takes 20 us, waking one 6 to 20, and one that still
// spins (some tens of microseconds after its last task) is there in 2, where a product of one token
// takes 30 to 400. One call at a time has them; a call made meanwhile, or from within a task, runs
// alone on its own thread. A forked process starts its own.
void parallel_for(size_t num_tasks, int num_threads,
                  const std::function<void(int worker, size_t i)>& task);

}  // namespace vtts

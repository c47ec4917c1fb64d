// A loop over tasks on a few threads.
#pragma once

#include <cstddef>
#include <functional>

namespace vtts {

// Runs task(worker, i) for every i < num_tasks; worker < num_threads is a number that the thread
// has to itself, so that it can own scratch memory. The first exception of a task is rethrown after
// all threads have stopped.
//
// The threads are those of the process's OpenMP team, if there is one, as torch's: threads of two
// kinds that wait for work take each other's cores (a vision tower took 2.2 s instead of 1.5).
// Otherwise they are our own, and kept: starting one takes 20 us, waking one 6 to 20, and one that
// still spins (some tens of microseconds after its last task) is there in 2, where a product of one
// token takes 30 to 400. One call at a time has those; a call made meanwhile, or from within a
// task, runs alone on its own thread. A forked process starts its own.
void parallel_for(size_t num_tasks, int num_threads,
                  const std::function<void(int worker, size_t i)>& task);

// Lets a process that forks before its first parallel_for know that it did.
void prepare_for_fork();

}  // namespace vtts

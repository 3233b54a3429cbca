//! Heavy work in worker processes: tasks, the pool, the worker's main loop.

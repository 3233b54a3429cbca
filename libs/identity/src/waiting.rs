//! Connections that wait until somebody wants one.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A few of them; of more the oldest are dropped.
#[derive(Debug)]
pub struct Waiting<T> {
    most: usize,
    all: Mutex<VecDeque<T>>,
    came: Notify,
}

impl<T> Waiting<T> {
    /// Keeps at most `most`.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            all: Mutex::default(),
            came: Notify::new(),
        }
    }

    /// One more.
    pub fn put(&self, one: T) {
        let mut all = self.all();
        all.push_back(one);
        if all.len() > self.most {
            all.pop_front();
        }
        self.came.notify_one();
    }

    /// The newest that `is_open`, once there is one. Others are dropped on the way.
    pub async fn next(&self, is_open: fn(&T) -> bool) -> T {
        loop {
            let came = self.came.notified();
            if let Some(one) = self.take(is_open) {
                return one;
            }
            came.await;
        }
    }

    fn take(&self, is_open: fn(&T) -> bool) -> Option<T> {
        let mut all = self.all();
        while let Some(one) = all.pop_back() {
            if is_open(&one) {
                // Two that come at once can wake one: whoever else waits is woken from here.
                if !all.is_empty() {
                    self.came.notify_one();
                }
                return Some(one);
            }
        }
        None
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<T>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_newest_of_a_few_is_taken() {
        let waiting = Waiting::new(3);
        (1..=5).for_each(|n| waiting.put(n));
        let odd = |n: &i32| n % 2 == 1;
        assert_eq!(waiting.take(odd), Some(5));
        assert_eq!(waiting.take(odd), Some(3), "the fourth is dropped");
        assert_eq!(waiting.take(odd), None, "there was room for three");
    }

    #[tokio::test]
    async fn nobody_waits_while_one_is_there() {
        let waiting = Waiting::new(3);
        let limit = Duration::from_secs(10);
        // Two found nothing and are about to wait when two come, which are kept as one.
        let (first, second) = (waiting.came.notified(), waiting.came.notified());
        waiting.put(1);
        waiting.put(2);
        tokio::time::timeout(limit, first).await.unwrap();
        assert_eq!(waiting.take(|_| true), Some(2));
        tokio::time::timeout(limit, second).await.unwrap();
        assert_eq!(waiting.take(|_| true), Some(1));
        let (last, ()) = tokio::join!(tokio::time::timeout(limit, waiting.next(|_| true)), async {
            waiting.put(3)
        });
        assert_eq!(last.unwrap(), 3);
    }
}

//! Spokes on other hosts whose staged bytes are pulled, on connections that they opened for it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use lotus_dataplane::{Dial, Duplex, Far};
use lotus_identity::Secured;
use tokio::sync::Notify;

/// Connections of one spoke that wait; of more the oldest are closed.
const WAITING: usize = 4;

/// The connections, by spoke. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct FarSpokes(Arc<Mutex<HashMap<String, Spoke>>>);

#[derive(Debug)]
struct Spoke {
    waiting: Arc<Waiting>,
    /// Keeps those in use for the next pull.
    far: Far,
}

#[derive(Debug, Default)]
struct Waiting {
    connections: Mutex<VecDeque<Secured>>,
    came: Notify,
}

impl FarSpokes {
    /// One more connection of the spoke with this name, which is `SERVICE/INSTANCE`.
    pub fn put(&self, name: &str, connection: Secured) {
        let waiting = self.at(name, |spoke| spoke.waiting.clone());
        let mut connections = waiting.lock();
        connections.push_back(connection);
        if connections.len() > WAITING {
            connections.pop_front();
        }
        drop(connections);
        waiting.came.notify_one();
    }

    /// What that spoke has staged. A pull waits until it has a connection.
    #[must_use]
    pub fn of(&self, name: &str) -> Far {
        self.at(name, |spoke| spoke.far.clone())
    }

    fn at<T>(&self, name: &str, look: impl FnOnce(&Spoke) -> T) -> T {
        let mut spokes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        look(spokes.entry(name.into()).or_insert_with(|| {
            let waiting = Arc::<Waiting>::default();
            let far = Far::new(Arc::new(Opened(waiting.clone())));
            Spoke { waiting, far }
        }))
    }
}

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Secured>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the newest of those that wait.
struct Opened(Arc<Waiting>);

#[async_trait::async_trait]
impl Dial for Opened {
    async fn dial(&self) -> io::Result<Box<dyn Duplex>> {
        loop {
            let came = self.0.came.notified();
            let newest = self.0.lock().pop_back();
            match newest {
                Some(connection) => return Ok(Box::new(connection)),
                None => came.await,
            }
        }
    }
}

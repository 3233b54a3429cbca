//! Spokes on other hosts whose staged bytes are pulled, on connections that they opened for it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use lotus_dataplane::{Dial, Duplex, Far};
use lotus_identity::{Secured, Waiting};

/// Connections of one spoke that wait; of more the oldest are closed.
const WAITING: usize = 4;

/// The connections, by spoke. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct FarSpokes(Arc<Mutex<HashMap<String, Spoke>>>);

#[derive(Debug)]
struct Spoke {
    waiting: Arc<Waiting<Secured>>,
    /// Keeps those in use for the next pull.
    far: Far,
}

impl FarSpokes {
    /// One more connection of the spoke with this name, which is `SERVICE/INSTANCE`.
    pub fn put(&self, name: &str, connection: Secured) {
        self.at(name, |spoke| spoke.waiting.put(connection));
    }

    /// What that spoke has staged. A pull waits until it has a connection.
    #[must_use]
    pub fn of(&self, name: &str) -> Far {
        self.at(name, |spoke| spoke.far.clone())
    }

    fn at<T>(&self, name: &str, look: impl FnOnce(&Spoke) -> T) -> T {
        let mut spokes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        look(spokes.entry(name.into()).or_insert_with(|| {
            let waiting = Arc::new(Waiting::new(WAITING));
            let far = Far::new(Arc::new(Opened(waiting.clone())));
            Spoke { waiting, far }
        }))
    }
}

/// Takes the newest of those that wait.
struct Opened(Arc<Waiting<Secured>>);

#[async_trait::async_trait]
impl Dial for Opened {
    async fn dial(&self) -> io::Result<Box<dyn Duplex>> {
        // One that has ended shows when it is used; the pull is tried again.
        Ok(Box::new(self.0.next(|_| true).await))
    }
}

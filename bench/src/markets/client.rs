//! A client of HTTP/1.1 that does little itself, so that it leaves the cores to the servers, and
//! many of it that ask again as soon as they are answered.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lotus_e2e::{Failed, secs};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

/// Bytes read at once.
const BUFFER: usize = 256 << 10;
/// Longest head of an answer.
const MAX_HEAD: usize = 16 << 10;
/// Longest that a request may take.
const PATIENCE: Duration = secs(120);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    pub(super) path: String,
    /// Bytes of the body that must come.
    pub(super) len: u64,
    /// Where they start, if they are a part.
    pub(super) from: Option<u64>,
}

impl Ask {
    pub(super) fn whole(path: String, len: u64) -> Self {
        let from = None;
        Self { path, len, from }
    }

    pub(super) fn part(path: &str, range: &Range<u64>) -> Self {
        Self {
            path: path.to_owned(),
            len: range.end - range.start,
            from: Some(range.start),
        }
    }

    fn head(&self, to: SocketAddr) -> String {
        let Self { path, len, from } = self;
        let range = from.map_or_else(String::new, |from| {
            format!("Range: bytes={from}-{}\r\n", from + len - 1)
        });
        format!("GET {path} HTTP/1.1\r\nHost: {to}\r\nAccept: */*\r\n{range}\r\n")
    }
}

/// One connection, which is kept.
#[derive(Debug)]
pub(super) struct Connection {
    to: SocketAddr,
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub(super) async fn open(to: SocketAddr) -> Result<Self, Failed> {
        let stream = tokio::time::timeout(PATIENCE, TcpStream::connect(to));
        let stream = stream.await.map_err(|_| slow(to))??;
        stream.set_nodelay(true)?;
        let buffer = vec![0; BUFFER];
        Ok(Self { to, stream, buffer })
    }

    /// Asks, reads the answer to its end and gives its body to `take`. Returns the time to the
    /// body's first byte.
    pub(super) async fn get(
        &mut self,
        ask: &Ask,
        take: impl FnMut(&[u8]),
    ) -> Result<Duration, Failed> {
        let to = self.to;
        let asked = tokio::time::timeout(PATIENCE, self.exchange(ask, take));
        asked.await.map_err(|_| slow(to))?
    }

    async fn exchange(
        &mut self,
        ask: &Ask,
        mut take: impl FnMut(&[u8]),
    ) -> Result<Duration, Failed> {
        let head = ask.head(self.to);
        let began = Instant::now();
        self.stream.write_all(head.as_bytes()).await?;
        let mut filled = 0;
        let body = loop {
            filled += self.read(filled).await?;
            match whole_head(&self.buffer[..filled]) {
                // The first byte counts, not the head.
                Some(end) if end < filled => break end,
                None if filled > MAX_HEAD => return Err(self.bad("no end of the head")),
                _ => {}
            }
        };
        let first = began.elapsed();
        let status = if ask.from.is_some() { "206" } else { "200" };
        self.check(body, status, ask.len)?;
        let mut left = ask.len;
        let mut part = body..filled;
        loop {
            left = left
                .checked_sub(part.len() as u64)
                .ok_or_else(|| self.bad("more than it said"))?;
            take(&self.buffer[part]);
            if left == 0 {
                return Ok(first);
            }
            part = 0..self.read(0).await?;
        }
    }

    async fn read(&mut self, from: usize) -> Result<usize, Failed> {
        match self.stream.read(&mut self.buffer[from..]).await? {
            0 => Err(self.bad("the connection ended")),
            n => Ok(n),
        }
    }

    /// Whether the head that ends at `end` has this status and length.
    fn check(&self, end: usize, status: &str, len: u64) -> Result<(), Failed> {
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_lowercase();
        let right = head.split_whitespace().nth(1) == Some(status)
            && head
                .lines()
                .filter_map(|l| l.strip_prefix("content-length:"))
                .any(|n| n.trim().parse() == Ok(len));
        if right {
            return Ok(());
        }
        Err(self.bad(&format!("not {status} with {len} bytes: {head}")))
    }

    fn bad(&self, what: &str) -> Failed {
        Failed(format!("answer of {}: {what}", self.to))
    }
}

fn slow(to: SocketAddr) -> Failed {
    Failed(format!("{to} took over {PATIENCE:?}"))
}

/// Where the head ends that is at the start of these bytes.
fn whole_head(bytes: &[u8]) -> Option<usize> {
    Some(bytes.windows(4).position(|w| w == b"\r\n\r\n")? + 4)
}

/// Asks `each` times over each of so many connections, all at once. `ask` gets the number of the
/// request. Returns the times to the first bytes.
pub(super) async fn closed_loop(
    to: SocketAddr,
    clients: usize,
    each: usize,
    ask: impl Fn(usize) -> Ask + Send + Sync + 'static,
) -> Result<Vec<Duration>, Failed> {
    let ask = Arc::new(ask);
    let mut open = Vec::new();
    // Before anybody asks: a server that accepts is not what is measured.
    for _ in 0..clients {
        open.push(Connection::open(to).await?);
    }
    let (mut all, start) = (JoinSet::new(), Arc::new(Barrier::new(clients)));
    for (n, mut connection) in open.into_iter().enumerate() {
        let (ask, start) = (ask.clone(), start.clone());
        all.spawn(async move {
            start.wait().await;
            let mut firsts = Vec::with_capacity(each);
            for i in 0..each {
                firsts.push(connection.get(&ask(n * each + i), |_| {}).await?);
            }
            Ok::<_, Failed>(firsts)
        });
    }
    let mut firsts = Vec::with_capacity(clients * each);
    while let Some(done) = all.join_next().await {
        firsts.extend(done.map_err(|e| Failed::at("client", e))??);
    }
    Ok(firsts)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_is_not_as_it_must_be_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let answers = [
            "HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc",
            "HTTP/1.1 206 Partial Content\r\ncontent-length: 3\r\n\r\nabcd",
            "HTTP/1.1 206 Partial Content\r\ncontent-length: 4\r\n\r\nabcd",
            "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
            "HTTP/1.1 206 Partial Content\r\ncontent-length: 3\r\n\r\nab",
        ];
        let serve = async {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 4096];
                let n = stream.read(&mut asked).await.unwrap();
                let asked = String::from_utf8_lossy(&asked[..n]).into_owned();
                assert!(asked.contains("Range: bytes=5-7\r\n"), "{asked}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let ask = Ask::part("/x", &(5..8));
        let client = async {
            let mut good = Vec::new();
            for _ in answers {
                let mut got = Vec::new();
                let mut connection = Connection::open(to).await.unwrap();
                let done = connection.get(&ask, |b| got.extend_from_slice(b)).await;
                good.push(done.is_ok() && got == b"abc");
            }
            good
        };
        let ((), good) = tokio::join!(serve, client);
        assert_eq!(good, [true, false, false, false, false]);
    }
}

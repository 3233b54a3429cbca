//! A provider that serves one large DAG, by its gateway and as a piece, and the same files for the
//! servers of others.

use std::io::Write as _;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cid::Cid;
use lotus_car::CarStore;
use lotus_e2e::{Failed, Net, NetConfig, demo, secs};
use rand::RngCore as _;

use super::client::{Ask, Connection};
use super::server::{Server, on_path, processor_time};

/// Bytes of a small block, which is a whole file.
pub(super) const BLOCK: usize = 16 << 10;
/// Small blocks.
const BLOCKS: usize = 1024;
/// Longest that processes may take to be ready, and a piece to be served.
const READY: Duration = secs(120);

/// What the servers serve.
pub(super) struct Served {
    net: Net,
    addr: SocketAddr,
    pid: u32,
    /// The CAR, which is the piece: the file that the hub holds.
    pub(super) car: PathBuf,
    pub(super) car_len: u64,
    /// `/piece/{cid}`.
    pub(super) piece: String,
    /// What the CAR's DAG hangs from.
    pub(super) root: Cid,
    /// The small blocks; a file of the same name and content is in [`Self::www`].
    pub(super) blocks: Vec<Cid>,
}

impl Served {
    /// Makes a file of so many megabytes and [`BLOCKS`] small ones, packs them as UnixFS and makes
    /// a deal for them.
    pub(super) async fn start(megabytes: u32) -> Result<Self, Failed> {
        let net = Net::start(&config()).await?;
        net.ready(READY).await?;
        let (data, car) = (net.root().join("data"), net.root().join("data.car"));
        let small = data.join("small");
        std::fs::create_dir_all(&small)?;
        std::fs::create_dir(net.root().join("www"))?;
        noise(&data.join("large"), u64::from(megabytes) * 1_000_000)?;
        for n in 0..BLOCKS {
            noise(&small.join(n.to_string()), BLOCK as u64)?;
        }
        let packed = (data.clone(), car.clone());
        let pack = tokio::task::spawn_blocking(move || lotus_car::pack_dir(&packed.0, &packed.1));
        let root = pack.await.map_err(|e| Failed::at("pack", e))?;
        let root = root.map_err(|e| Failed::at("pack", e))?;
        std::fs::remove_dir_all(&data)?;
        let blocks = blocks(&car, &net.root().join("www"))?;
        eprintln!("a deal for a DAG of {megabytes} MB");
        let deal = demo::propose(&net, &car).await?;
        let url = net.spoke_url("retrieval")?;
        let addr = url.trim_start_matches("http://").parse();
        let pid = net.process("retrieval").await?.pid;
        let mut served = Self {
            addr: addr.map_err(|e| Failed::at(&url, e))?,
            pid: pid.ok_or_else(|| Failed::new("retrieval does not run"))?,
            car_len: std::fs::metadata(&car)?.len(),
            car,
            piece: format!("/piece/{}", deal.piece_cid),
            root,
            blocks,
            net,
        };
        served.ready().await?;
        served.share()?;
        Ok(served)
    }

    /// Waits until the piece and its blocks are served, and looks at some bytes.
    async fn ready(&self) -> Result<(), Failed> {
        let last = self.blocks.last();
        let last = last.ok_or_else(|| Failed::new("the CAR has no small blocks"))?;
        let block = Ask::whole(raw(last), BLOCK as u64);
        let range = self.car_len / 2..self.car_len / 2 + 5_000_000;
        let part = Ask::part(&self.piece, &range);
        let wanted = part_of(&self.car, &range)?;
        self.net
            .wait("the piece and its index", READY, async |_| {
                let mut connection = Connection::open(self.addr).await.ok()?;
                connection.get(&block, |_| {}).await.ok()?;
                let mut got = Vec::new();
                let take = |bytes: &[u8]| got.extend_from_slice(bytes);
                connection.get(&part, take).await.ok()?;
                (got == wanted).then_some(())
            })
            .await
    }

    /// Gives the others the very file that the hub holds: how it lies in memory counts.
    fn share(&mut self) -> Result<(), Failed> {
        let root = self.net.root();
        let held = file_of(&root.join("miner/pieces"), self.car_len)?;
        let held = held.ok_or_else(|| Failed::new("the hub holds no such piece"))?;
        std::os::unix::fs::symlink(&held, root.join("www/piece"))?;
        std::fs::remove_file(std::mem::replace(&mut self.car, held))?;
        Ok(())
    }

    /// Where retrieval listens.
    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Processor time that retrieval took so far.
    pub(super) fn processor_time(&self) -> Result<Duration, Failed> {
        processor_time(self.pid)
    }

    /// nginx, if it is installed: the CAR is `/piece`, a small block `/{cid}`.
    pub(super) fn nginx(&self) -> Result<Option<Server>, Failed> {
        let Some(exe) = on_path("nginx") else {
            return Ok(None);
        };
        let root = self.net.root();
        Server::nginx(&exe, &root.join("nginx"), &root.join("www")).map(Some)
    }

    /// frisbii, if it is installed, with the same CAR.
    pub(super) fn frisbii(&self) -> Result<Option<Server>, Failed> {
        let Some(exe) = on_path("frisbii") else {
            return Ok(None);
        };
        Server::frisbii(&exe, &self.net.root().join("frisbii"), &self.car).map(Some)
    }

    /// The `n`th range of `len` bytes, aligned to them; they go around.
    pub(super) fn range(&self, n: usize, len: u64) -> Range<u64> {
        let from = (n as u64 % (self.car_len / len).max(1)) * len;
        from..(from + len).min(self.car_len)
    }

    pub(super) async fn stop(self) -> Result<(), Failed> {
        self.net.stop().await
    }
}

/// What installs nginx.
pub(super) const NO_NGINX: &str = "it is not installed: apt-get install nginx-light";

/// Path of a block at our gateway.
pub(super) fn raw(block: &Cid) -> String {
    format!("/ipfs/{block}?format=raw")
}

/// Large sectors that nobody seals: what is served is the piece that the hub holds for them. One
/// address is all the clients here.
fn config() -> NetConfig {
    let mut cfg = NetConfig {
        devnet_args: "--listen 127.0.0.1:0 --sector-size 32GiB --block-time-ms 500 \
                      --deadlines 3 --deadline-epochs 7200 --winning-lookback 10"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        services: ["deals", "retrieval"].map(str::to_owned).into(),
        ..NetConfig::default()
    };
    let hub = [
        ("LOTUS_MINER__WORKERS__SEAL_WORKERS", "0"),
        ("LOTUS_MINER__SEALING__WAIT_DEALS_SECS", "86400"),
    ];
    cfg.hub_env.extend(hub.map(|(k, v)| (k.into(), v.into())));
    for limit in [
        "MAX_REQUESTS",
        "MAX_REQUESTS_PER_CLIENT",
        "MAX_CONNECTIONS",
        "MAX_CONNECTIONS_PER_CLIENT",
    ] {
        let key = format!("LOTUS_MARKETS__RETRIEVAL__{limit}");
        cfg.spoke_env.insert(key, "2048".into());
    }
    cfg
}

/// The CIDs of the small blocks of a CAR, each with its bytes written to a file of its name.
fn blocks(car: &Path, to: &Path) -> Result<Vec<Cid>, Failed> {
    let failed = |e: &dyn std::fmt::Display| Failed::at("CAR", e);
    let store = CarStore::open(car).map_err(|e| failed(&e))?;
    let mut blocks = Vec::new();
    for cid in store.cids() {
        let data = store.get(cid).map_err(|e| failed(&e))?;
        let Some(data) = data.filter(|d| d.len() == BLOCK) else {
            continue;
        };
        std::fs::write(to.join(cid.to_string()), data)?;
        blocks.push(*cid);
    }
    Ok(blocks)
}

/// The file of so many bytes in a folder.
fn file_of(dir: &Path, len: u64) -> std::io::Result<Option<PathBuf>> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let found = match meta.is_dir() {
            true => file_of(&entry.path(), len)?,
            false => (meta.len() == len).then(|| entry.path()),
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn part_of(file: &Path, range: &Range<u64>) -> Result<Vec<u8>, Failed> {
    use std::os::unix::fs::FileExt as _;
    let len = usize::try_from(range.end - range.start).map_err(|e| Failed::at("range", e))?;
    let mut bytes = vec![0; len];
    std::fs::File::open(file)?.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes)
}

/// A file of so many random bytes.
pub(super) fn noise(path: &Path, mut len: u64) -> Result<(), Failed> {
    let mut file = std::fs::File::create(path)?;
    let mut bytes = vec![0; 1 << 20];
    let mut rng = rand::rng();
    while len > 0 {
        let part = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
        rng.fill_bytes(&mut bytes[..part]);
        file.write_all(&bytes[..part])?;
        len -= part as u64;
    }
    Ok(())
}

use std::path::Path;

use cid::Cid;
use libp2p_identity::Keypair;
use lotus_journal::{Journal, JournalError, Map, Tx};
use lotus_piece_index::{Hooks, PieceIndex, Wanted};
use lotus_runtime::Fault;
use lotus_types::{Kind, PieceCid, PieceInfo};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::sync::watch;

use crate::ad::{Ad, CHUNK, Encoded, Extended, GATEWAY, PIECE_HTTP, chunk, no_entries};
use crate::addr::Multiaddr;

/// Advertisements and the chunks of pieces as a whole, by CID. Chunks of blocks are in it only
/// where an older version wrote them.
const BLOCKS: Map<String, ByteBuf> = Map::new("blocks");
/// Where the multihashes of a chunk are, by [`chunk_key`].
const CHUNKS: Map<String, ChunkRef> = Map::new("chunks");
/// The newest advertisement, at [`HEAD_KEY`].
const HEAD: Map<String, Head> = Map::new("head");
/// The extended providers that are advertised, at [`HEAD_KEY`]: id and address of each.
const EXTENDED: Map<String, Vec<(String, String)>> = Map::new("extended-providers");
/// Who signs the chain, at [`HEAD_KEY`].
const PROVIDER: Map<String, String> = Map::new("provider");
/// What of each piece is advertised now.
const PIECES: Map<String, Advertised> = Map::new("pieces");

const HEAD_KEY: &str = "head";
/// Pieces read at once when all are gone through.
const PAGE: usize = 1000;

/// A chunk that is made again when it is asked for, from the list of the piece's multihashes.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ChunkRef {
    piece: PieceCid,
    /// Its first multihash, in the order of the list.
    from: u64,
    next: Option<Cid>,
}

/// Two pieces may hold the same blocks, and then share chunks: each has its own entry.
fn chunk_key(chunk: &Cid, piece: &PieceCid) -> String {
    format!("{chunk}/{piece}")
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Head {
    cid: Cid,
    /// What it says of where the content is.
    addresses: Vec<String>,
}

/// What of a piece is advertised.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Advertised {
    pub(crate) info: PieceInfo,
    /// Its blocks, and the chunks that list them.
    payload: Option<Vec<Cid>>,
    /// The piece itself, likewise.
    piece: Option<Vec<Cid>>,
}

/// Which of a piece's two advertisements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Its blocks, behind the gateway.
    Payload,
    /// The piece as a whole.
    Piece,
}

impl Side {
    /// Names the advertisement for later updates and removal: the piece CID, version 1 for the
    /// blocks and version 2 for the piece.
    pub(crate) fn context(self, info: &PieceInfo) -> Vec<u8> {
        match self {
            Self::Payload => info.cid.cid().to_bytes(),
            Self::Piece => info.cid_v2().to_bytes(),
        }
    }

    pub(crate) fn metadata(self) -> Vec<u8> {
        match self {
            Self::Payload => GATEWAY.to_vec(),
            Self::Piece => PIECE_HTTP.to_vec(),
        }
    }
}

/// The advertisement chain, on disk.
pub(crate) struct Chain {
    journal: Journal,
    index: PieceIndex,
    pub(crate) key: Keypair,
    /// Where clients get the content.
    pub(crate) retrieval: Multiaddr,
    head: watch::Sender<Option<Cid>>,
}

impl Chain {
    pub(crate) fn open(
        path: &Path,
        index: PieceIndex,
        key: Keypair,
        retrieval: Multiaddr,
        extended: Vec<Extended>,
    ) -> Result<Self, Fault> {
        let journal = journal_of(path, &key.public().to_peer_id().to_base58())?;
        let chain = Self {
            journal,
            index,
            key,
            retrieval,
            head: watch::Sender::default(),
        };
        chain.readdress()?;
        chain.extend(extended)?;
        let head = chain
            .journal
            .read(|v| v.get(&HEAD, &HEAD_KEY.to_owned()))
            .map_err(fault)?;
        chain.head.send_replace(head.map(|h| h.cid));
        Ok(chain)
    }

    /// The newest advertisement, now and after each change.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Cid>> {
        self.head.subscribe()
    }

    pub(crate) fn provider(&self) -> String {
        self.key.public().to_peer_id().to_base58()
    }

    /// An advertisement or a chunk.
    pub(crate) fn block(&self, cid: &Cid) -> Result<Option<Vec<u8>>, Fault> {
        let prefix = format!("{cid}/");
        let (stored, chunk) = self
            .journal
            .read(|v| {
                let stored = v.get(&BLOCKS, &cid.to_string())?;
                let chunk = v.scan(&CHUNKS, Some(&prefix), 1)?.pop();
                Ok::<_, JournalError>((stored, chunk))
            })
            .map_err(fault)?;
        if let Some(stored) = stored {
            return Ok(Some(stored.into_vec()));
        }
        let Some((_, at)) = chunk.filter(|(key, _)| key.starts_with(&prefix)) else {
            return Ok(None);
        };
        let made = self.chunk(&at.piece, at.from, at.next)?;
        match made.filter(|made| made.cid == *cid) {
            Some(made) => Ok(Some(made.bytes)),
            // Its piece goes at this moment, or is indexed anew.
            None => Err(Fault::new(
                Kind::Transport,
                format!("the list of piece {} does not give chunk {cid}", at.piece),
                "ask again; if it lasts, `lotus-markets index verify` says why",
            )),
        }
    }

    /// The chunk of a piece that starts with the `from`th multihash.
    fn chunk(
        &self,
        piece: &PieceCid,
        from: u64,
        next: Option<Cid>,
    ) -> Result<Option<Encoded>, Fault> {
        let hashes = self.index.multihashes(piece, from, CHUNK)?;
        if hashes.is_empty() {
            return Ok(None);
        }
        Ok(Some(chunk(&hashes, next)?))
    }

    /// What of a piece is advertised.
    pub(crate) fn advertised(&self, piece: &PieceCid) -> Result<Option<Advertised>, Fault> {
        self.journal
            .read(|v| v.get(&PIECES, &piece.to_string()))
            .map_err(fault)
    }

    /// When the content has moved, one advertisement says so for all: indexers keep one set of
    /// addresses for a provider.
    fn readdress(&self) -> Result<(), Fault> {
        self.write(|tx| {
            let head = tx.get(&HEAD, &HEAD_KEY.to_owned()).map_err(fault)?;
            let moved = head.is_some_and(|h| h.addresses != [self.retrieval.text.clone()]);
            let any = tx.scan(&PIECES, None, 1).map_err(fault)?.pop();
            let (true, Some((_, piece))) = (moved, any) else {
                return Ok(None);
            };
            let side = if piece.payload.is_some() {
                Side::Payload
            } else {
                Side::Piece
            };
            self.append(tx, &piece.info, side, no_entries(), false)
                .map(Some)
        })
    }

    /// Says for everything who else has it, when that has changed. The provider itself is one of
    /// them, as indexers demand.
    fn extend(&self, mut extended: Vec<Extended>) -> Result<(), Fault> {
        let others = extended.len();
        extended.insert(
            0,
            Extended {
                key: self.key.clone(),
                address: self.retrieval.text.clone(),
            },
        );
        let now: Vec<_> = extended
            .iter()
            .map(|e| (e.id(), e.address.clone()))
            .collect();
        self.write(|tx| {
            let key = HEAD_KEY.to_owned();
            let before = tx.get(&EXTENDED, &key).map_err(fault)?;
            if before.is_none() && others == 0 || before.as_ref() == Some(&now) {
                return Ok(None);
            }
            let ad = Ad {
                previous: None,
                provider: self.provider(),
                addresses: vec![self.retrieval.text.clone()],
                entries: no_entries(),
                context: Vec::new(),
                metadata: Vec::new(),
                is_rm: false,
                extended,
            };
            tx.put(&EXTENDED, &key, &now).map_err(fault)?;
            self.push(tx, ad).map(Some)
        })
    }

    /// One transaction; the head that it sets is told when it is on disk.
    fn write(&self, f: impl FnOnce(&mut Tx) -> Result<Option<Cid>, Fault>) -> Result<(), Fault> {
        let out = self.journal.write(|tx| f(tx).map_err(Failed::Fault));
        let head = out.map_err(|e| match e {
            Failed::Fault(f) => f,
            Failed::Journal(e) => fault(e),
        })?;
        if let Some(cid) = head {
            tracing::info!(%cid, "advertisement published");
            metrics::counter!("lotus_markets_advertisements_total").increment(1);
            self.head.send_replace(Some(cid));
        }
        Ok(())
    }

    /// Puts a new advertisement at the head of the chain.
    fn append(
        &self,
        tx: &mut Tx,
        info: &PieceInfo,
        side: Side,
        entries: Cid,
        is_rm: bool,
    ) -> Result<Cid, Fault> {
        let ad = Ad {
            previous: None,
            provider: self.provider(),
            addresses: vec![self.retrieval.text.clone()],
            entries,
            context: side.context(info),
            metadata: if is_rm { Vec::new() } else { side.metadata() },
            is_rm,
            extended: Vec::new(),
        };
        self.push(tx, ad)
    }

    /// Signs an advertisement as the one that follows the head, and makes it the head.
    fn push(&self, tx: &mut Tx, mut ad: Ad) -> Result<Cid, Fault> {
        let previous = tx.get(&HEAD, &HEAD_KEY.to_owned()).map_err(fault)?;
        ad.previous = previous.map(|h| h.cid);
        let addresses = ad.addresses.clone();
        let ad = ad.sign(&self.key)?;
        put(tx, &ad)?;
        let head = Head {
            cid: ad.cid,
            addresses,
        };
        tx.put(&HEAD, &HEAD_KEY.to_owned(), &head).map_err(fault)?;
        Ok(ad.cid)
    }

    /// Makes one side of a piece advertised or not. Does nothing when it is so already.
    fn side(&self, info: &PieceInfo, side: Side, wanted: bool) -> Result<(), Fault> {
        let is = |a: &Advertised| match side {
            Side::Payload => a.payload.is_some(),
            Side::Piece => a.piece.is_some(),
        };
        let now = self.advertised(&info.cid)?.as_ref().is_some_and(is);
        if now == wanted {
            return Ok(());
        }
        let key = info.cid.to_string();
        self.write(|tx| {
            let mut known = tx.get(&PIECES, &key).map_err(fault)?.unwrap_or(Advertised {
                info: *info,
                payload: None,
                piece: None,
            });
            let slot = match side {
                Side::Payload => &mut known.payload,
                Side::Piece => &mut known.piece,
            };
            let cid = if wanted {
                let chunks = match side {
                    Side::Payload => self.payload_chunks(tx, &info.cid)?,
                    Side::Piece => {
                        let hashes = [*info.cid.cid().hash(), *info.cid_v2().hash()];
                        let only = chunk(&hashes, None)?;
                        put(tx, &only)?;
                        vec![only.cid]
                    }
                };
                let Some(first) = chunks.first().copied() else {
                    return Ok(None);
                };
                *slot = Some(chunks);
                self.append(tx, info, side, first, false)?
            } else {
                // Nobody may read the entries of what is taken back.
                for old in slot.take().unwrap_or_default() {
                    tx.remove(&BLOCKS, &old.to_string()).map_err(fault)?;
                    tx.remove(&CHUNKS, &chunk_key(&old, &info.cid))
                        .map_err(fault)?;
                }
                self.append(tx, info, side, no_entries(), true)?
            };
            if known.payload.is_none() && known.piece.is_none() {
                tx.remove(&PIECES, &key).map_err(fault)?;
            } else {
                tx.put(&PIECES, &key, &known).map_err(fault)?;
            }
            Ok(Some(cid))
        })
    }

    /// Names the chunks of a piece's multihashes, the last first, for each links to the next.
    /// Memory: one chunk, and a CID for each.
    fn payload_chunks(&self, tx: &mut Tx, piece: &PieceCid) -> Result<Vec<Cid>, Fault> {
        let count = self.index.count(piece)?;
        let mut chunks = Vec::new();
        for n in (0..count.div_ceil(CHUNK as u64)).rev() {
            let from = n * CHUNK as u64;
            let next = chunks.last().copied();
            let Some(made) = self.chunk(piece, from, next)? else {
                break;
            };
            let at = ChunkRef {
                piece: *piece,
                from,
                next,
            };
            tx.put(&CHUNKS, &chunk_key(&made.cid, piece), &at)
                .map_err(fault)?;
            chunks.push(made.cid);
        }
        chunks.reverse();
        Ok(chunks)
    }
}

impl Hooks for Chain {
    fn apply(&self, info: &PieceInfo, wanted: Wanted) -> Result<(), Fault> {
        self.side(info, Side::Payload, wanted.announce_payload)?;
        self.side(info, Side::Piece, wanted.announce_piece)
    }

    fn gone(&self, piece: &PieceCid) -> Result<(), Fault> {
        let Some(known) = self.advertised(piece)? else {
            return Ok(());
        };
        self.side(&known.info, Side::Payload, false)?;
        self.side(&known.info, Side::Piece, false)
    }

    fn known(&self) -> Result<Vec<PieceCid>, Fault> {
        let mut out = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let page = self
                .journal
                .read(|v| v.scan(&PIECES, after.as_ref(), PAGE))
                .map_err(fault)?;
            let Some((last, _)) = page.last() else {
                return Ok(out);
            };
            after = Some(last.clone());
            out.extend(page.into_iter().map(|(_, a)| a.info.cid));
        }
    }
}

/// Opens the chain of a provider. One of another provider is of no use: indexers take from it
/// only what its own key has signed.
fn journal_of(path: &Path, provider: &str) -> Result<Journal, Fault> {
    let key = HEAD_KEY.to_owned();
    let mut journal = Journal::open(path).map_err(fault)?;
    let known = journal.read(|v| v.get(&PROVIDER, &key)).map_err(fault)?;
    match known {
        Some(known) if known == provider => return Ok(journal),
        Some(known) => {
            tracing::warn!(
                known,
                provider,
                "the provider's key is another one: everything is advertised anew"
            );
            drop(journal);
            std::fs::remove_file(path)?;
            journal = Journal::open(path).map_err(fault)?;
        }
        None => {}
    }
    journal
        .write(|tx| tx.put(&PROVIDER, &key, &provider.to_owned()))
        .map_err(fault)?;
    Ok(journal)
}

fn put(tx: &mut Tx, block: &Encoded) -> Result<(), Fault> {
    let bytes = ByteBuf::from(block.bytes.clone());
    tx.put(&BLOCKS, &block.cid.to_string(), &bytes)
        .map_err(fault)
}

enum Failed {
    Fault(Fault),
    Journal(JournalError),
}

impl From<JournalError> for Failed {
    fn from(e: JournalError) -> Self {
        Self::Journal(e)
    }
}

fn fault(e: JournalError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

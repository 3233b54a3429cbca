//! A client of the release before, built from nothing but the descriptors of its contract, at
//! today's hub: every method of that contract answers it, and it understands the answers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use hub_proto::API_VERSION;
use lotus_e2e::download::store;
use lotus_e2e::{Net, NetConfig, secs};
use lotus_node_client::json::address_text;
use lotus_types::{Commitment, PieceCid};
use prost_reflect::prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, MethodDescriptor, Value};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder, Streaming};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

const LIMIT: Duration = secs(20);

/// What API 1.1 may do without asking. A feature stays for as long as its major version.
const FEATURES: [&str; 6] = [
    "pull.unix",
    "pull.http",
    "lease",
    "events",
    "proving",
    "market",
];

/// The hub of `net`, as a process of the operator's reaches it, and what each request has to carry.
fn dial(net: &Net) -> (Channel, MetadataMap) {
    let socket = net.root().join("miner/run/hub.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    let channel = endpoint.connect_timeout(LIMIT).connect_lazy();
    (channel, MetadataMap::new())
}

/// The client.
struct Old {
    pool: DescriptorPool,
    /// The methods of its contract, as `Service/Method`.
    methods: BTreeMap<String, MethodDescriptor>,
    channel: Channel,
    metadata: MetadataMap,
    called: Mutex<BTreeSet<String>>,
}

impl Old {
    fn new(net: &Net, (major, minor): (u32, u32)) -> Self {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../hub-proto/golden/hub-v{major}.{minor}.binpb"));
        let pool = DescriptorPool::decode(std::fs::read(golden).unwrap().as_slice()).unwrap();
        let methods = pool
            .services()
            .flat_map(|s| s.methods().collect::<Vec<_>>())
            .map(|m| (format!("{}/{}", m.parent_service().name(), m.name()), m))
            .collect();
        let (channel, metadata) = dial(net);
        Self {
            pool,
            methods,
            channel,
            metadata,
            called: Mutex::default(),
        }
    }

    /// Calls a method with a request in protobuf's text format.
    async fn start(&self, name: &str, text: &str) -> Result<Streaming<DynamicMessage>, Status> {
        let method = self.methods.get(name);
        let method = method.unwrap_or_else(|| panic!("the contract has no {name}"));
        self.called.lock().unwrap().insert(name.to_owned());
        let message = DynamicMessage::parse_text_format(method.input(), text)
            .unwrap_or_else(|e| panic!("{name}: {e}: {text}"));
        let mut request = Request::new(message);
        request.metadata_mut().clone_from(&self.metadata);
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        let call = async {
            grpc.ready().await.unwrap();
            let path = path.parse().unwrap();
            grpc.server_streaming(request, path, Golden(method.output()))
                .await
        };
        Ok(in_time(name, call).await?.into_inner())
    }

    /// The answer, or the first message of it.
    async fn ask(&self, name: &str, text: &str) -> Result<DynamicMessage, Status> {
        let mut answer = self.start(name, text).await?;
        let first = in_time(name, answer.message()).await?;
        Ok(first.unwrap_or_else(|| panic!("{name}: an answer without a message")))
    }

    /// The answer, which has these fields.
    async fn gets(&self, name: &str, text: &str, fields: &[&str]) -> DynamicMessage {
        let answer = self.ask(name, text).await;
        let answer = answer.unwrap_or_else(|s| panic!("{name}, {text}: {s}"));
        has(name, &answer, fields);
        answer
    }

    /// The call is refused with this code, and with what this client knows of why.
    async fn refused(&self, name: &str, text: &str, code: Code) {
        let status = match self.ask(name, text).await {
            Ok(answer) => panic!("{name}, {text}: {}", answer.to_text_format()),
            Err(status) => status,
        };
        assert_eq!(status.code(), code, "{name}, {text}: {status}");
        let detail = self.pool.get_message_by_name("hub.v1.ErrorDetail").unwrap();
        let detail = DynamicMessage::decode(detail, status.details()).unwrap();
        has(name, &detail, &["kind", "fix"]);
    }

    /// The name of an enum's value, of those that this client knows.
    fn name(&self, of: &str, value: &Value) -> String {
        let known = self.pool.get_enum_by_name(of).unwrap();
        let number = value.as_enum_number().unwrap();
        let value = known.get_value(number);
        let value = value.unwrap_or_else(|| panic!("{of} {number} is new"));
        value.name().to_owned()
    }

    fn phase(&self, piece: &DynamicMessage) -> String {
        self.name("hub.v1.PiecePhase", &field(piece, "phase"))
    }
}

/// Messages as the contract has them.
#[derive(Clone)]
struct Golden(MessageDescriptor);

impl Codec for Golden {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        self.clone()
    }

    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Encoder for Golden {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, item: DynamicMessage, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let done = item.encode(to);
        done.map_err(|e| Status::internal(e.to_string()))
    }
}

impl Decoder for Golden {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let item = DynamicMessage::decode(self.0.clone(), from);
        item.map(Some).map_err(|e| Status::internal(e.to_string()))
    }
}

async fn in_time<T>(what: &str, call: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(LIMIT, call).await;
    done.unwrap_or_else(|_| panic!("{what}: no answer in {LIMIT:?}"))
}

fn has(name: &str, message: &DynamicMessage, fields: &[&str]) {
    let text = message.to_text_format();
    for field in fields {
        assert!(
            message.has_field_by_name(field),
            "{name}: no {field}: {text}"
        );
    }
}

fn field(message: &DynamicMessage, name: &str) -> Value {
    message.get_field_by_name(name).unwrap().into_owned()
}

fn text(message: &DynamicMessage, name: &str) -> String {
    field(message, name).as_str().unwrap().to_owned()
}

fn list(message: &DynamicMessage, name: &str) -> Vec<Value> {
    field(message, name).as_list().unwrap().to_vec()
}

fn hello(major: u32, minor: u32) -> String {
    format!(r#"major: {major} minor: {minor} service: "cli" instance: "old""#)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_the_release_before_is_served() {
    let (major, minor) = API_VERSION;
    let Some(before) = minor.checked_sub(1) else {
        // The first of its major version has none before it.
        return;
    };
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let stored = store(&net, 100_000).await.unwrap();
    let piece = stored.path.trim_start_matches("/piece/");
    let old = Old::new(&net, (major, before));

    versions(&old, before).await;
    hub(&net, &old).await;
    hand_off(&old).await;
    sectors(&net, &old).await;
    unsealed(&old, piece).await;
    events(&old).await;
    chain(&net, &old).await;

    let called = old.called.into_inner().unwrap();
    let left: Vec<_> = old
        .methods
        .keys()
        .filter(|m| !called.contains(*m))
        .collect();
    assert!(
        left.is_empty(),
        "nobody calls {left:?}: say what it answers"
    );
    net.stop().await.unwrap();
}

/// Who may say hello: docs/hub-api.md, "Versions".
async fn versions(old: &Old, before: u32) {
    let (major, minor) = API_VERSION;
    let fields = ["major", "minor", "generation", "features", "data_socket"];
    // A newer client knows of this hub, and decides.
    for said in [before, minor, 99] {
        let answer = old.gets("Hub/Hello", &hello(major, said), &fields).await;
        let hub = (field(&answer, "major"), field(&answer, "minor"));
        assert_eq!(hub, (Value::U32(major), Value::U32(minor)), "to {said}");
        let features = list(&answer, "features");
        for feature in FEATURES {
            let feature = Value::String(feature.into());
            assert!(features.contains(&feature), "no {feature:?} for {said}");
        }
    }
    for (major, minor) in [(major + 1, 0), (major - 1, 9)] {
        let code = Code::PermissionDenied;
        old.refused("Hub/Hello", &hello(major, minor), code).await;
    }
}

async fn hub(net: &Net, old: &Old) {
    let fields = ["actor", "sector_size", "network", "proof_mode"];
    // The height is 0 until the hub hears of a tipset.
    let height = net.wait("the hub to see a block", secs(20), async |_| {
        let identity = old.gets("Hub/Identity", "", &fields).await;
        identity.has_field_by_name("height").then_some(())
    });
    height.await.unwrap();
    // Each field of these can be of no news.
    let safe = old.gets("Hub/SafeToRestart", "wait_ms: 1", &[]).await;
    let reasons = list(&safe, "reasons");
    assert_eq!(
        field(&safe, "safe"),
        Value::Bool(reasons.is_empty()),
        "{safe:?}"
    );
    old.gets("Hub/WatchProving", "", &[]).await;

    let fields = ["free_bytes", "max_piece_size"];
    old.gets("Capacity/Watch", "", &fields).await;
}

/// Takes room for a piece whose bytes are not to be had, offers it, and takes it back.
async fn hand_off(old: &Old) {
    let key = r#"key { client: "t01001" id: "01ARZ3NDEKTSV4RRFFQ69G5FAV" }"#;
    let cid = PieceCid::new(Commitment([1; 32])).to_string();

    let ask = format!("{key} piece_size: 2048 ttl_seconds: 60");
    let fields = ["id", "generation", "expires_unix_ms"];
    let credit = old.gets("Capacity/Acquire", &ask, &fields).await;
    let credit = text(&credit, "id");
    let unused = ask.replace("5FAV", "5FAW");
    let unused = old.gets("Capacity/Acquire", &unused, &fields).await;
    let unused = format!("id: {:?}", text(&unused, "id"));
    old.gets("Capacity/Release", &unused, &[]).await;
    let none = format!("{key} piece_size: 2047");
    old.refused("Capacity/Acquire", &none, Code::InvalidArgument)
        .await;

    old.refused("Pieces/Status", key, Code::NotFound).await;
    let offer = format!(
        r#"{key} piece_cid: "{cid}" piece_size: 2048 raw_size: 1000
           source {{ http {{ url: "http://127.0.0.1:1/" headers {{ key: "a" value: "b" }} }} }}
           terms {{ start_epoch: 1000000 end_epoch: 1600000 }}
           use {{ index: true announce_payload: true format: "raw" }}
           credit: "{credit}""#
    );
    let known = ["key", "phase", "piece_cid", "piece_size", "raw_size"];
    let fields = [&known[..], &["use", "terms"]].concat();
    for (name, text) in [
        ("Pieces/Offer", offer.as_str()),
        ("Pieces/Offer", offer.as_str()),
        ("Pieces/Status", key),
    ] {
        let state = old.gets(name, text, &fields).await;
        let phase = old.phase(&state);
        let waits = ["PIECE_PHASE_OFFERED", "PIECE_PHASE_PULLING"];
        assert!(waits.contains(&phase.as_str()), "{name}: {phase}");
    }
    let withdrawn = old.gets("Pieces/Withdraw", key, &fields).await;
    assert_eq!(old.phase(&withdrawn), "PIECE_PHASE_WITHDRAWN");
    old.refused("Pieces/Offer", key, Code::InvalidArgument)
        .await;

    // This one, and the one that was stored before.
    let mut pieces = Vec::new();
    let mut after = String::new();
    loop {
        let page = format!("limit: 1 after: {after:?}");
        let page = old.gets("Pieces/List", &page, &[]).await;
        pieces.extend(list(&page, "pieces"));
        after = text(&page, "next");
        if after.is_empty() {
            break;
        }
        assert!(pieces.len() < 10, "the list has no end");
    }
    assert_eq!(pieces.len(), 2, "{pieces:?}");
    for piece in &pieces {
        has("Pieces/List", piece.as_message().unwrap(), &known);
    }
}

async fn sectors(net: &Net, old: &Old) {
    let sector = net.wait("the piece to be in a sector", secs(60), async |_| {
        let all = old.gets("Sectors/List", "limit: 10", &[]).await;
        let sectors = list(&all, "sectors").into_iter();
        let mut sectors = sectors.map(|s| s.as_message().unwrap().clone());
        sectors.find(|s| !list(s, "pieces").is_empty())
    });
    let sector = sector.await.unwrap();
    has("Sectors/List", &sector, &["state", "pieces"]);
    let number = field(&sector, "number").as_u64().unwrap();
    let ask = format!("number: {number} log: true");
    let sector = old.gets("Sectors/Get", &ask, &["state", "log"]).await;
    let entry = list(&sector, "log")[0].as_message().unwrap().clone();
    has("Sectors/Get", &entry, &["unix_ms", "event", "to"]);
    let pieces = list(&sector, "pieces");
    let piece = pieces
        .iter()
        .find(|p| p.as_message().unwrap().has_field_by_name("key"));
    let fields = ["piece_cid", "piece_size", "key"];
    has("Sectors/Get", piece.unwrap().as_message().unwrap(), &fields);
    old.refused("Sectors/Get", "number: 4000000000", Code::NotFound)
        .await;
}

async fn unsealed(old: &Old, piece: &str) {
    let ask = format!("piece_cid: {piece:?}");
    let fields = ["known", "readable", "piece_size", "raw_size"];
    old.gets("Unsealed/Locate", &ask, &fields).await;
    old.gets("Unsealed/RequestUnseal", &ask, &fields).await;
    let fields = [
        "token",
        "generation",
        "expires_unix_ms",
        "raw_size",
        "piece_size",
    ];
    let lease = format!("{ask} ttl_seconds: 30");
    old.gets("Unsealed/Lease", &lease, &fields).await;

    let nowhere = PieceCid::new(Commitment([2; 32])).to_string();
    let nowhere = format!("piece_cid: {nowhere:?}");
    let answer = old.gets("Unsealed/Locate", &nowhere, &[]).await;
    assert_eq!(field(&answer, "known"), Value::Bool(false));
    for name in ["Unsealed/Lease", "Unsealed/RequestUnseal"] {
        old.refused(name, &nowhere, Code::NotFound).await;
        let junk = r#"piece_cid: "junk""#;
        old.refused(name, junk, Code::InvalidArgument).await;
    }
}

async fn events(old: &Old) {
    let mut answer = old.start("Events/Subscribe", "").await.unwrap();
    // Those of the piece that was stored, and then as blocks come.
    let mut missing = BTreeSet::from(["piece", "sector", "head"]);
    let mut last = 0;
    let listen = async {
        while !missing.is_empty() {
            let event = answer.message().await.unwrap().unwrap();
            has("Events/Subscribe", &event, &["generation", "unix_ms"]);
            let seq = field(&event, "seq").as_u64().unwrap();
            assert!(seq >= last, "{seq} after {last}");
            last = seq;
            missing.retain(|what| !event.has_field_by_name(what));
        }
    };
    in_time("events of each kind", listen).await;
    let late = format!("from_seq: {}", u64::MAX);
    old.refused("Events/Subscribe", &late, Code::OutOfRange)
        .await;
    let junk = r#"topics: "junk""#;
    old.refused("Events/Subscribe", junk, Code::InvalidArgument)
        .await;
}

async fn chain(net: &Net, old: &Old) {
    old.gets("Chain/Head", "", &["tipset"]).await;

    let client = net.node().unwrap().wallet_list().await.unwrap()[0];
    let client = format!("client: {:?}", address_text(&client));
    let none = format!("{client} id: 1000000");
    old.refused("Chain/Allocation", &none, Code::NotFound).await;
    let ask = format!("{client} piece_size: 2048");
    let fields = ["key", "available", "collateral_min"];
    old.gets("Chain/MarketClient", &ask, &fields).await;
    let stranger = r#"client: "t099999999" piece_size: 2048"#;
    old.refused("Chain/MarketClient", stranger, Code::NotFound)
        .await;

    let junk = r#"deals: "junk""#;
    old.refused("Chain/Publish", junk, Code::InvalidArgument)
        .await;
    let ask = r#"price: "1" verified_price: "0" min_piece_size: 256 max_piece_size: 2048
                 timestamp: 1 expiry: 1000 seq_no: 1"#;
    old.gets("Chain/SignAsk", ask, &["signature"]).await;
}

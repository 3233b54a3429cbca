//! A deal client of others, boostly, makes a deal by proposal (MK1.2) with a storage provider of
//! ours over libp2p, and follows it into a proven sector. It needs Go and modules from its
//! registry: `cargo xtask peers` runs it, or says what is missing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use lotus_actors::market::{ADD_BALANCE, AddBalanceParams};
use lotus_actors::{actors, encode};
use lotus_e2e::{Net, NetConfig, peers, secs};
use lotus_node_client::api::{Message, TipSetKey};
use lotus_node_client::json::parse_address;
use lotus_types::{Address, TokenAmount};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::task::JoinSet;

/// Time for a deal to be sealed.
const SEALED: Duration = secs(400);

/// Gives a file out over HTTP. The first connection breaks off half way.
async fn file_server(bytes: Vec<u8>, tasks: &mut JoinSet<()>) -> u16 {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut breaks = true;
        while let Ok((mut s, _)) = server.accept().await {
            let mut buf = vec![0; 8192];
            let n = s.read(&mut buf).await.unwrap_or(0);
            let head = String::from_utf8_lossy(&buf[..n]).to_ascii_lowercase();
            let from = head
                .split_once("range: bytes=")
                .and_then(|(_, r)| r.split_once('-')?.0.parse::<usize>().ok());
            let len = bytes.len();
            let status = match from {
                Some(at) => format!(
                    "206 Partial Content\r\ncontent-range: bytes {at}-{}/{len}",
                    len - 1
                ),
                None => "200 OK".into(),
            };
            let rest = &bytes[from.unwrap_or(0).min(len)..];
            let sent = if breaks { rest.len() / 2 } else { rest.len() };
            breaks = false;
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                rest.len()
            );
            // A client that goes away is its own affair.
            drop(s.write_all(head.as_bytes()).await);
            drop(s.write_all(&rest[..sent]).await);
        }
    });
    port
}

/// Puts some of a client's FIL into the market.
async fn add_balance(net: &Net, client: Address) {
    let node = net.node().unwrap();
    let message = Message {
        version: 0,
        to: actors::MARKET.address(),
        from: client,
        nonce: node.mpool_get_nonce(client).await.unwrap(),
        value: TokenAmount::from_whole(10),
        gas_limit: 100_000_000,
        gas_fee_cap: TokenAmount::from_nano(1),
        gas_premium: TokenAmount::from_atto(100_000),
        method: ADD_BALANCE,
        params: encode(&AddBalanceParams {
            provider_or_client: client,
        }),
    };
    let signed = node.wallet_sign_message(client, &message).await.unwrap();
    node.mpool_push(&signed).await.unwrap();
    net.wait("the client's escrow", secs(60), async |_| {
        let funds = node.state_market_balance(client, &TipSetKey::HEAD).await;
        funds.ok()?.escrow.is_positive().then_some(())
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs go: cargo xtask peers"]
async fn boostly() {
    let Some(peer) = peers::installed("boostly", peers::go_here("boostly").await) else {
        return;
    };
    let files = tempfile::tempdir().unwrap();
    std::fs::create_dir(files.path().join("data")).unwrap();
    let data: Vec<u8> = (0..900_000u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(files.path().join("data/file.bin"), data).unwrap();
    let car = files.path().join("data.car");
    let root = lotus_car::pack_dir(&files.path().join("data"), &car).unwrap();
    let bytes = std::fs::read(&car).unwrap();
    let piece = lotus_proofs::commp(bytes.as_slice()).unwrap();
    let size = bytes.len();
    let mut servers = JoinSet::new();
    let port = file_server(bytes, &mut servers).await;

    let mut config = NetConfig {
        services: vec!["deals".into()],
        ..NetConfig::default()
    };
    for (key, value) in [
        ("ALLOW_PRIVATE_SOURCES", "true"),
        ("PULL_PORTS", &format!("[{port}]")),
        ("PULL_BACKOFF_SECS", "1"),
        ("MK12__PUBLISH_PERIOD_SECS", "0"),
        ("MK12__PRICE_ATTOFIL", "1073741824"),
        (
            "MK12__RETRIEVAL_ADDRESSES",
            "[\"/dns/sp.example/tcp/443/https\"]",
        ),
    ] {
        let key = format!("LOTUS_MARKETS__DEALS__{key}");
        config.spoke_env.insert(key, value.into());
    }
    let net = Net::start(&config).await.unwrap();
    net.ready(secs(120)).await.unwrap();

    // A client with funds in the market.
    let repo = net.root().join("devnet").display().to_string();
    let devnet = async |words: &[&str]| {
        let args = [&["--repo", &repo], words].concat();
        net.run("lotus-devnet", &args)
            .await
            .unwrap()
            .trim()
            .to_owned()
    };
    let client = devnet(&["wallet", "new", "secp256k1"]).await;
    let client = client
        .lines()
        .next_back()
        .unwrap_or_default()
        .trim()
        .to_owned();
    devnet(&["wallet", "fund", &client, "1000"]).await;
    let node = net.node().unwrap();
    let address = parse_address(&client).unwrap();
    net.wait("the client's funds", secs(60), async |_| {
        node.state_account_key(address, &TipSetKey::HEAD).await.ok()
    })
    .await
    .unwrap();
    let height = node.chain_head().await.unwrap().height.0;
    let run_dir = net.root().join("markets/run");
    let at = lotus_runtime::addr_file::read(&run_dir, "deals-p2p").unwrap();
    let devnet_file = |name: &str| std::fs::read_to_string(net.root().join("devnet").join(name));
    let token = devnet_file("token").unwrap().trim().to_owned();
    let url = lotus_runtime::addr_file::read(&net.root().join("devnet/run"), "api").unwrap();

    let numbers = [
        ("--piece-size", piece.size.get().to_string()),
        ("--size", size.to_string()),
        ("--start", (height + 2_000).to_string()),
        ("--end", (height + 2_000 + 530_000).to_string()),
    ];
    let mut words = vec![
        ("--peer", at),
        ("--node", format!("http://{url}/rpc/v1")),
        ("--token", token),
        ("--client", client),
        ("--piece-cid", piece.cid.to_string()),
        ("--root", root.to_string()),
        ("--url", format!("http://127.0.0.1:{port}/data.car")),
        ("--patience", format!("{}s", SEALED.as_secs())),
    ];
    words.extend(numbers);
    let deal = async |price: &str| {
        let mut command = Command::new(&peer);
        for (name, value) in &words {
            command.args([*name, value]);
        }
        command.args(["--price", price]);
        let out = peers::run(&mut command, SEALED + secs(30)).await;
        let out = out.unwrap_or_else(|e| panic!("{e}\n{}", net.logs()));
        serde_json::from_str::<Value>(&out).unwrap()
    };

    let cheap = deal("0").await;
    assert_eq!(cheap["accepted"], false);
    let reason = cheap["message"].as_str().unwrap();
    assert!(
        reason.starts_with("failed validation: storage price per epoch less than asking price"),
        "{reason}"
    );
    let dear = deal("1048576").await;
    let reason = dear["message"].as_str().unwrap();
    assert!(
        reason.starts_with("failed validation: client available funds in escrow 0 not enough"),
        "{reason}"
    );
    add_balance(&net, address).await;

    let made = deal("1048576").await;
    assert_eq!(made["accepted"], true, "{made}");
    let protocols = made["protocols"].as_array().unwrap();
    for protocol in [
        "/fil/storage/mk/1.2.0",
        "/fil/storage/mk/1.2.1",
        "/fil/storage/status/1.2.0",
        "/fil/storage/ask/1.1.0",
        "/fil/retrieval/transports/1.0.0",
    ] {
        assert!(protocols.contains(&json!(protocol)), "{protocol}: {made}");
    }
    assert_eq!(made["transports"], json!({"http": 1}));
    let ask = &made["ask"]["Ask"]["Ask"];
    assert_eq!(
        (&ask["MaxPieceSize"], &ask["SeqNo"]),
        (&json!(8 << 20), &json!(0))
    );
    let last = &made["last"];
    assert_eq!(
        (&last["error"], &last["sealingStatus"]),
        (&json!(""), &json!("Proving")),
        "{made}"
    );
    assert_eq!(last["status"], "Complete");
    assert_eq!(last["nBytesReceived"], json!(size));
    assert_eq!(last["proposalIsOurs"], true);

    // What the chain says of it.
    let id = last["chainDealId"].as_u64().unwrap();
    let head = TipSetKey::HEAD;
    let on_chain = node.state_market_storage_deal(id, &head).await.unwrap();
    assert_eq!(on_chain.proposal.piece_cid, piece.cid.cid());
    assert!(on_chain.state.sector_start_epoch.0 > 0, "{on_chain:?}");
    net.stop().await.unwrap();
}

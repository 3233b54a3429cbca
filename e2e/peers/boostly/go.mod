module github.com/lotus-hub/lotus-hub/e2e/peers/boostly

go 1.24

require (
	github.com/filecoin-project/go-address v1.1.0
	github.com/filecoin-project/go-cbor-util v0.0.1
	github.com/filecoin-project/go-state-types v0.12.0
	github.com/filecoin-shipyard/boostly v0.0.0-20230824095226-2a165e4422ad
	github.com/google/uuid v1.6.0
	github.com/ipfs/go-cid v0.5.0
	github.com/ipld/go-ipld-prime v0.21.0
	github.com/libp2p/go-libp2p v0.48.0
	github.com/whyrusleeping/cbor-gen v0.0.0-20230418232409-daab9ece03a0
)

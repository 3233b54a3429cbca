// A MK1.2 client over libp2p, around boostly: it asks a provider for its transports and its ask,
// proposes a deal, and follows it until its sector has a state. What it saw goes to the standard
// output, as JSON. With the argument "golden" it prints messages instead, for tests.
package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/filecoin-project/go-address"
	cborutil "github.com/filecoin-project/go-cbor-util"
	"github.com/filecoin-project/go-state-types/abi"
	"github.com/filecoin-project/go-state-types/big"
	"github.com/filecoin-project/go-state-types/builtin/v9/market"
	"github.com/filecoin-project/go-state-types/crypto"
	"github.com/filecoin-shipyard/boostly"
	"github.com/google/uuid"
	"github.com/ipfs/go-cid"
	"github.com/ipld/go-ipld-prime"
	"github.com/ipld/go-ipld-prime/codec/dagcbor"
	"github.com/ipld/go-ipld-prime/codec/dagjson"
	"github.com/ipld/go-ipld-prime/fluent/qp"
	"github.com/ipld/go-ipld-prime/node/basicnode"
	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	cbg "github.com/whyrusleeping/cbor-gen"
)

type report struct {
	Protocols  []string        `json:"protocols"`
	Transports map[string]int  `json:"transports"`
	Ask        json.RawMessage `json:"ask"`
	UUID       string          `json:"uuid"`
	Accepted   bool            `json:"accepted"`
	Message    string          `json:"message"`
	// Every state that was seen, once.
	Seen []string `json:"seen"`
	// The last answer.
	Last *last `json:"last"`
}

type last struct {
	Error             string `json:"error"`
	Status            string `json:"status"`
	SealingStatus     string `json:"sealingStatus"`
	PublishCid        string `json:"publishCid"`
	SignedProposalCid string `json:"signedProposalCid"`
	ChainDealID       uint64 `json:"chainDealId"`
	TransferSize      uint64 `json:"transferSize"`
	NBytesReceived    uint64 `json:"nBytesReceived"`
	ProposalIsOurs    bool   `json:"proposalIsOurs"`
}

var (
	spAddr    = flag.String("peer", "", "multiaddress of the provider, with its peer id")
	nodeURL   = flag.String("node", "", "URL of a full node's RPC whose wallet signs")
	token     = flag.String("token", "", "its token")
	client    = flag.String("client", "", "address of the client")
	provider  = flag.String("provider", "t01000", "address of the provider")
	pieceCid  = flag.String("piece-cid", "", "CID of the piece")
	pieceSize = flag.Uint64("piece-size", 0, "padded size of the piece")
	root      = flag.String("root", "", "CID of the DAG in it")
	url       = flag.String("url", "", "where the file is")
	size      = flag.Uint64("size", 0, "bytes of the file")
	start     = flag.Int64("start", 0, "start epoch")
	end       = flag.Int64("end", 0, "end epoch")
	price     = flag.Int64("price", 0, "attoFIL per epoch")
	until     = flag.String("until", "Proving", "sealing status to wait for")
	patience  = flag.Duration("patience", 5*time.Minute, "longest wait for it")
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "golden" {
		golden()
		return
	}
	flag.Parse()
	r, err := run()
	out, _ := json.Marshal(r)
	fmt.Println(string(out))
	if err != nil {
		fmt.Fprintln(os.Stderr, "boostly-peer:", err)
		os.Exit(1)
	}
}

func run() (*report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), *patience)
	defer cancel()
	r := &report{Transports: map[string]int{}}
	sp, err := peer.AddrInfoFromString(*spAddr)
	if err != nil {
		return r, err
	}
	h, err := libp2p.New(libp2p.NoListenAddrs)
	if err != nil {
		return r, err
	}
	defer h.Close()
	if err := h.Connect(ctx, *sp); err != nil {
		return r, err
	}
	protocols, err := h.Peerstore().GetProtocols(sp.ID)
	if err != nil {
		return r, err
	}
	for _, p := range protocols {
		r.Protocols = append(r.Protocols, string(p))
	}
	transports, err := boostly.QueryTransports(ctx, h, sp.ID)
	if err != nil {
		return r, fmt.Errorf("transports: %w", err)
	}
	for _, t := range transports.Protocols {
		r.Transports[t.Name] = len(t.Addresses)
	}
	miner, err := address.NewFromString(*provider)
	if err != nil {
		return r, err
	}
	if r.Ask, err = ask(ctx, h, sp.ID, miner); err != nil {
		return r, fmt.Errorf("ask: %w", err)
	}

	deal, err := proposal(ctx, miner)
	if err != nil {
		return r, err
	}
	r.UUID = deal.DealUUID.String()
	answer, err := propose(ctx, h, sp.ID, deal)
	if err != nil {
		return r, fmt.Errorf("propose: %w", err)
	}
	r.Accepted, r.Message = answer.Accepted, answer.Message
	if !r.Accepted {
		return r, nil
	}
	return r, follow(ctx, h, sp.ID, deal, r)
}

// The ask: boostly has no type for it.
func ask(ctx context.Context, h host.Host, sp peer.ID, miner address.Address) (json.RawMessage, error) {
	s, err := h.NewStream(ctx, sp, "/fil/storage/ask/1.1.0")
	if err != nil {
		return nil, err
	}
	defer s.Close()
	question, err := qp.BuildMap(basicnode.Prototype.Any, 1, func(m ipld.MapAssembler) {
		qp.MapEntry(m, "Miner", qp.Bytes(miner.Bytes()))
	})
	if err != nil {
		return nil, err
	}
	if err := dagcbor.Encode(question, s); err != nil {
		return nil, err
	}
	builder := basicnode.Prototype.Any.NewBuilder()
	if err := (dagcbor.DecodeOptions{AllowLinks: true, DontParseBeyondEnd: true}).Decode(builder, s); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = dagjson.Encode(builder.Build(), &out)
	return out.Bytes(), err
}

func proposal(ctx context.Context, miner address.Address) (*boostly.DealProposal, error) {
	clientAddr, err := address.NewFromString(*client)
	if err != nil {
		return nil, err
	}
	piece, err := cid.Decode(*pieceCid)
	if err != nil {
		return nil, err
	}
	rootCid, err := cid.Decode(*root)
	if err != nil {
		return nil, err
	}
	label, err := market.NewLabelFromString(rootCid.String())
	if err != nil {
		return nil, err
	}
	p := market.DealProposal{
		PieceCID: piece, PieceSize: abi.PaddedPieceSize(*pieceSize), Client: clientAddr, Provider: miner,
		Label: label, StartEpoch: abi.ChainEpoch(*start), EndEpoch: abi.ChainEpoch(*end),
		StoragePricePerEpoch: big.NewInt(*price), ProviderCollateral: big.Zero(), ClientCollateral: big.Zero(),
	}
	raw, err := cborutil.Dump(&p)
	if err != nil {
		return nil, err
	}
	signature, err := sign(ctx, raw)
	if err != nil {
		return nil, err
	}
	params, err := json.Marshal(boostly.HttpRequest{URL: *url})
	if err != nil {
		return nil, err
	}
	return &boostly.DealProposal{
		DealUUID:           uuid.New(),
		ClientDealProposal: market.ClientDealProposal{Proposal: p, ClientSignature: *signature},
		DealDataRoot:       rootCid,
		Transfer:           boostly.Transfer{Type: "http", Params: params, Size: *size},
	}, nil
}

// boostly.ProposeDeal with a pointer: its proposal goes by value, which has no encoder.
func propose(ctx context.Context, h host.Host, sp peer.ID, deal *boostly.DealProposal) (*boostly.DealProposalResponse, error) {
	s, err := h.NewStream(ctx, sp, boostly.FilStorageMarketProtocol_1_2_0)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	if until, ok := ctx.Deadline(); ok {
		if err := s.SetDeadline(until); err != nil {
			return nil, err
		}
	}
	if err := cborutil.WriteCborRPC(s, deal); err != nil {
		return nil, err
	}
	var answer boostly.DealProposalResponse
	if err := cborutil.ReadCborRPC(s, &answer); err != nil {
		return nil, err
	}
	return &answer, nil
}

// Asks for the state of the deal until its sector has the one that is waited for, or it failed.
func follow(ctx context.Context, h host.Host, sp peer.ID, deal *boostly.DealProposal, r *report) error {
	wanted, err := cborutil.Dump(&deal.ClientDealProposal.Proposal)
	if err != nil {
		return err
	}
	for {
		s, err := boostly.GetDealStatus(ctx, h, sp, deal.DealUUID, sign)
		if err != nil {
			return fmt.Errorf("status: %w", err)
		}
		if s.DealStatus == nil {
			return fmt.Errorf("status: %s", s.Error)
		}
		d := s.DealStatus
		got, err := cborutil.Dump(&d.Proposal)
		if err != nil {
			return err
		}
		r.Last = &last{
			Error: d.Error, Status: d.Status, SealingStatus: d.SealingStatus,
			SignedProposalCid: d.SignedProposalCid.String(), ChainDealID: uint64(d.ChainDealID),
			TransferSize: s.TransferSize, NBytesReceived: s.NBytesReceived, ProposalIsOurs: bytes.Equal(got, wanted),
		}
		if d.PublishCid != nil {
			r.Last.PublishCid = d.PublishCid.String()
		}
		if n := len(r.Seen); n == 0 || r.Seen[n-1] != d.Status {
			r.Seen = append(r.Seen, d.Status)
		}
		if d.Error != "" || d.SealingStatus == *until {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// The node's wallet signs.
func sign(ctx context.Context, data []byte) (*crypto.Signature, error) {
	body, err := json.Marshal(map[string]any{
		"jsonrpc": "2.0", "id": 1, "method": "Filecoin.WalletSign", "params": []any{*client, data},
	})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, *nodeURL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+*token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	var answer struct {
		Result *crypto.Signature
		Error  *struct{ Message string }
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Error != nil {
		return nil, fmt.Errorf("WalletSign: %s", answer.Error.Message)
	}
	return answer.Result, nil
}

func show(name string, m cbg.CBORMarshaler) {
	var b bytes.Buffer
	if err := m.MarshalCBOR(&b); err != nil {
		panic(err)
	}
	fmt.Println(name, hex.EncodeToString(b.Bytes()))
}

// Messages with fixed values: services/deals/src/mk12/wire/golden.txt.
func golden() {
	must := func(c cid.Cid, err error) cid.Cid {
		if err != nil {
			panic(err)
		}
		return c
	}
	clientAddr, err := address.NewFromString("t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za")
	if err != nil {
		panic(err)
	}
	miner, err := address.NewIDAddress(1000)
	if err != nil {
		panic(err)
	}
	piece := must(cid.Decode("baga6ea4seaqao7s73y24kcutaosvacpdjgfe5pw76ooefnyqw4ynr3d2y6x2mpq"))
	rootCid := must(cid.Decode("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"))
	label, err := market.NewLabelFromString("label")
	if err != nil {
		panic(err)
	}
	var sig [65]byte
	for i := range sig {
		sig[i] = byte(i)
	}
	signature := crypto.Signature{Type: crypto.SigTypeSecp256k1, Data: sig[:]}
	p := market.DealProposal{
		PieceCID: piece, PieceSize: 2048, Client: clientAddr, Provider: miner, Label: label,
		StartEpoch: 5000, EndEpoch: 600000, StoragePricePerEpoch: big.NewInt(77),
		ProviderCollateral: big.NewInt(0), ClientCollateral: big.NewInt(5),
	}
	id := uuid.MustParse("3a1b5c7d-0001-4002-8003-000000000004")
	signed := market.ClientDealProposal{Proposal: p, ClientSignature: signature}
	show("deal", &boostly.DealProposal{
		DealUUID: id, ClientDealProposal: signed, DealDataRoot: rootCid, RemoveUnsealedCopy: true,
		Transfer: boostly.Transfer{
			Type: "http", ClientID: "c1", Size: 2000,
			Params: []byte(`{"URL":"http://sp.example/a.car","Headers":null}`),
		},
	})
	show("offline", &boostly.DealProposal{
		DealUUID: id, IsOffline: true, ClientDealProposal: signed, DealDataRoot: rootCid, SkipIPNIAnnounce: true,
	})
	show("accepted", &boostly.DealProposalResponse{Accepted: true})
	show("refused", &boostly.DealProposalResponse{Message: "no"})
	show("question", &boostly.DealStatusRequest{DealUUID: id, Signature: signature})
	node, err := cborutil.AsIpld(&signed)
	if err != nil {
		panic(err)
	}
	fmt.Println("cid", node.Cid())
	show("unknown", &boostly.DealStatusResponse{DealUUID: id, Error: "none"})
	show("status", &boostly.DealStatusResponse{
		DealUUID: id, TransferSize: 2000, NBytesReceived: 2000,
		DealStatus: &boostly.DealStatus{
			Status: "Published", SealingStatus: "PreCommit1", Proposal: p, SignedProposalCid: node.Cid(),
			PublishCid: &rootCid, ChainDealID: abi.DealID(9),
		},
	})
}

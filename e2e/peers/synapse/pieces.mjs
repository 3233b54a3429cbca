// Uploads and finds pieces as an application does, with a client library that knows nothing of
// this project, and prints what it did as one JSON document.
//
// SERVICE_URL names the deal service. The second piece is written to PIECE_FILE.

import { writeFile } from 'node:fs/promises'
import * as Piece from '@filoz/synapse-core/piece'
import * as SP from '@filoz/synapse-core/sp'

const serviceURL = process.env.SERVICE_URL
const fill = (length, seed) => Uint8Array.from({ length }, (_, i) => (i * 7 + seed) % 251)

await SP.ping(serviceURL)

// The piece is named before its bytes.
const classic = fill(300_000, 1)
const classicCid = await Piece.calculate(classic)
await SP.uploadPiece({ serviceURL, data: classic, pieceCid: classicCid })
await SP.findPiece({ serviceURL, pieceCid: classicCid })
// Again: it is there already.
await SP.uploadPiece({ serviceURL, data: classic, pieceCid: classicCid })

// The piece is named after its bytes, which are hashed while they are sent.
const streamed = fill(1_000_000, 2)
const { pieceCid, size } = await SP.uploadPieceStreaming({ serviceURL, data: streamed })
const found = await SP.findPiece({ serviceURL, pieceCid })
await writeFile(process.env.PIECE_FILE, streamed)

// What is not there is not found, and wrong bytes are refused.
const missing = await Piece.calculate(fill(1_000, 3))
const notFound = await SP.findPiece({ serviceURL, pieceCid: missing, retryCount: 0 })
  .then(() => '', e => e.message)
const refused = await SP.uploadPiece({ serviceURL, data: fill(1_000, 4), pieceCid: missing, retryCount: 0 })
  .then(() => '', e => e.message)

console.log(JSON.stringify({
  classic: classicCid.toString(),
  streamed: pieceCid.toString(),
  found: found.toString(),
  size,
  notFound,
  refused
}))
process.exit(0)

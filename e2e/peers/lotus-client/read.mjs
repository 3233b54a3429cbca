// Reads a hub as an operator's script does, with a client library for Lotus' API that knows nothing
// of this project, and prints what it read as one JSON document.
//
// MINER_API_INFO names the API and the token, as `lotus-miner auth api-info` prints it.

import { LotusRPC } from '@filecoin-shipyard/lotus-client-rpc'
import { NodejsProvider } from '@filecoin-shipyard/lotus-client-provider-nodejs'
import { mainnet } from '@filecoin-shipyard/lotus-client-schema'

const [token, address] = process.env.MINER_API_INFO.split(':')
const [, , host, , port] = address.split('/')

async function read (scheme) {
  const provider = new NodejsProvider(`${scheme}://${host}:${port}/rpc/v0`, { token })
  const client = new LotusRPC(provider, { schema: mainnet.storageMiner })
  const actor = await client.actorAddress()
  const sectors = await client.sectorsList()
  const local = await client.storageLocal()
  const [storage] = Object.keys(local)
  const found = {
    version: await client.version(),
    actor,
    sectorSize: await client.actorSectorSize(actor),
    addresses: await client.actorAddressConfig(),
    base: (await client.miningBase()).Height,
    session: await client.session(),
    permissions: await client.authVerify(token),
    sectors,
    summary: await client.sectorsSummary(),
    status: await Promise.all(sectors.map(number => client.sectorsStatus(number, true))),
    storage: {
      local,
      list: await client.storageList(),
      info: await client.storageInfo(storage),
      stat: await client.storageStat(storage)
    },
    workers: await client.workerStats(),
    jobs: await client.workerJobs(),
    sched: await client.sealingSchedDiag(false),
    // What the hub has not must be refused, and not hang.
    refused: await client.pledgeSector().then(() => '', e => e.message)
  }
  await client.destroy()
  return found
}

console.log(JSON.stringify({ http: await read('http'), ws: await read('ws') }))
process.exit(0)

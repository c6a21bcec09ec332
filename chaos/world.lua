--- What the harness has in its hands: three nodes, links to them, a balancer, a publisher and a consumer.
--
-- Blocking, on purpose: what is under test runs in processes of its own. Only what was started here is ended.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local free_port = require("support.ports").free
local process = require "support.process"
local ledger = require "chaos.ledger"

local world = { nodes = 3 }

local root = os.getenv "MOONRABBIT_CHAOS_ROOT" or "."
local name = os.getenv "MOONRABBIT_BROKER"
local folder = os.getenv "MOONRABBIT_CHAOS_DIR" or root .. "/build/chaos"

-- Seconds that a command may take.
local LIMIT = 150

local now, sleep, quote = native.now, native.sleep, process.quote
world.now, world.sleep = now, sleep

--- Waits for something true; nil after so many seconds.
function world.eventually(fn, seconds)
  local until_then = now() + seconds
  repeat
    local result = fn()
    if result then return result end
    sleep(0.05)
  until now() > until_then
end

-- ---- Commands -----------------------------------------------------------------------------------------------

-- Runs a command of the shell; its output. Throws when it fails.
local function run(command, limit)
  local pipe = io.popen(("timeout -k 5 %d %s 2>&1"):format(limit or LIMIT, command))
  local output = pipe:read "a"
  if not pipe:close() then error(command .. ": " .. output, 2) end
  return output
end

local function broker(verb, node, ...)
  local words = { root .. "/scripts/broker", verb, "--name", name }
  if node then
    words[#words + 1] = "--node"
    words[#words + 1] = tostring(node)
  end
  for _, word in ipairs { ... } do words[#words + 1] = quote(word) end
  return run(table.concat(words, " "))
end

function world.kill(node) broker("kill", node) end
function world.stop(node) broker("stop", node) end
function world.restart(node) broker("restart", node) end
function world.pause(node) broker("pause", node) end
function world.resume(node) broker("resume", node) end
function world.ctl(node, ...) return broker("ctl", node, ...) end

-- ---- The cluster --------------------------------------------------------------------------------------------

local uris, managements = {}, {}
for uri in (os.getenv "AMQP_URLS" or ""):gmatch "[^,]+" do uris[#uris + 1] = uri end
for uri in (os.getenv "AMQP_MANAGEMENT_URLS" or ""):gmatch "[^,]+" do managements[#managements + 1] = uri end

local function port_of(uri) return assert(moonrabbit.uri.parse(uri)).port end

-- The URIs with other ports.
local function at_ports(ports)
  local list = {}
  for i, port in ipairs(ports) do list[i] = (uris[1]:gsub(":%d+/", ":" .. port .. "/")) end
  return list
end

-- A list of three, with one in front and the others after it.
local function beginning_with(list, first)
  local order = {}
  for i = 0, #list - 1 do order[i + 1] = list[(first - 1 + i) % #list + 1] end
  return order
end

--- The management API of a node.
function world.management(node)
  return (assert(require("moonrabbit.management").new { uri = managements[node], timeout = 10 }))
end

--- Runs fn(channel) on a connection to a node.
function world.on(node, fn)
  local conn = assert(moonrabbit.connect { uri = uris[node], reconnect = false, timeout = 30 })
  local result = fn(assert(conn:channel()))
  conn:close(5)
  return result
end

--- The kinds of queue, and what makes each.
world.kinds = { "classic", "mirrored", "quorum" }

function world.queue_name(fault, kind) return "chaos-" .. kind .. "-" .. fault:gsub("[^%w]+", "-") end

function world.declare(channel, queue)
  local arguments = queue:find "^chaos%-quorum" and { ["x-queue-type"] = "quorum" } or nil
  return channel:queue_declare(queue, { durable = true, arguments = arguments })
end

--- Mirrors are never behind when one is promoted, so that no confirmed message is lost.
function world.set_policy()
  assert(world.eventually(function()
    return world.management(1):set_policy("/", "chaos", { pattern = "^chaos-mirrored", apply_to = "queues",
      definition = { ["ha-mode"] = "all", ["ha-sync-mode"] = "automatic", ["ha-promote-on-failure"] = "when-synced" } })
  end, 60), "the policy could not be set")
end

--- Waits until every queue has all its copies; false when they have not come together in time.
function world.together(queues, seconds)
  return world.eventually(function()
    local listed = world.ctl(1, "-q", "list_queues", "name", "slave_pids", "synchronised_slave_pids", "members",
      "online")
    for _, queue in ipairs(queues) do
      local line = listed:match(queue:gsub("%p", "%%%0") .. "\t[^\n]*")
      if not line then return false end
      local _, mirrors, synced, members, online = line:match "^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)"
      local function count(text) return select(2, (text or ""):gsub("@", "")) end
      if queue:find "mirrored" and (count(mirrors) < 2 or count(synced) < 2) then return false end
      if queue:find "quorum" and count(online) < count(members) then return false end
    end
    return true
  end, seconds) or false
end

-- ---- Links and the balancer ---------------------------------------------------------------------------------

local links

--- Starts the links: one to each node.
function world.start_links()
  local targets = {}
  for i, uri in ipairs(uris) do targets[i] = "127.0.0.1:" .. port_of(uri) end
  links = process.start({ root .. "/chaos/links.lua", table.unpack(targets) })
  local line = assert(world.eventually(function() return links:out():match "^(.-)\n" end, 20), links:err())
  local ports = {}
  for port in line:gmatch "%d+" do ports[#ports + 1] = tonumber(port) end
  links.control = assert(native.open({ host = "127.0.0.1", port = table.remove(ports, 1) }, nil, 5))
  links.ports = ports
end

--- Tells the links something: "silent 2".
function world.link(command)
  assert(links.control:write(command .. "\n", 5))
  local answer = assert(links.control:read(100, 5))
  assert(answer == "ok\n", command .. ": " .. answer)
end

function world.links_pass()
  for i = 1, world.nodes do world.link("pass " .. i) end
end

local balancer

--- Starts HAProxy in front of the nodes.
function world.start_balancer()
  local port = balancer and balancer.port or free_port()
  local path = folder .. "/haproxy.cfg"
  local file = assert(io.open(path, "w"))
  file:write(([[
global
  maxconn 200
defaults
  mode tcp
  timeout connect 1s
  timeout client 1h
  timeout server 1h
  option redispatch
  retries 2
listen amqp
  bind 127.0.0.1:%d
  balance leastconn
  default-server check inter 300ms fall 2 rise 2 on-marked-down shutdown-sessions
]]):format(port))
  for i, uri in ipairs(uris) do file:write(("  server node%d 127.0.0.1:%d\n"):format(i, port_of(uri))) end
  file:close()
  balancer = process.start({ "haproxy", "-db", "-f", path }, { raw = true })
  balancer.port = port
  assert(world.eventually(function()
    local stream = native.open({ host = "127.0.0.1", port = port }, nil, 1)
    if stream then stream:close() end
    return stream
  end, 30), "haproxy does not listen: " .. balancer:err())
end

function world.kill_balancer()
  balancer:signal "KILL"
  balancer:wait(5)
end

--- URIs by way of the nodes themselves, the links or the balancer, the clients' node first.
function world.endpoints(via, first)
  if via == "balancer" then return at_ports { balancer.port } end
  if via == "links" then return beginning_with(at_ports(links.ports), first) end
  return beginning_with(uris, first)
end

-- ---- Workers ------------------------------------------------------------------------------------------------

local function literal(value)
  if type(value) ~= "table" then return type(value) == "string" and ("%q"):format(value) or tostring(value) end
  local parts = {}
  for key, each in pairs(value) do parts[#parts + 1] = "[" .. literal(key) .. "]=" .. literal(each) end
  return "{" .. table.concat(parts, ",") .. "}"
end

local workers = {}

--- Starts the publisher or the consumer with a plan; `worker.book` follows its ledger.
function world.start_worker(kind, where, plan)
  plan.ledger = where .. "/" .. kind .. ".ledger"
  local path = where .. "/" .. kind .. ".plan"
  local file = assert(io.open(path, "w"))
  file:write("return ", literal(plan), "\n")
  file:close()
  local worker = process.start({ root .. "/chaos/" .. kind .. ".lua", path })
  worker.plan, worker.kind, worker.where = plan, kind, where
  worker.book = ledger.follow(plan.ledger)
  workers[worker] = true
  return worker
end

--- Asks a worker to end and waits for it; killed when it does not. Its complaints, if it had any.
function world.end_worker(worker, seconds)
  worker:signal "TERM"
  local code = worker:wait(seconds)
  local complaint = worker:err()
  if not code then complaint = complaint .. "\n(it did not end by itself)" end
  worker:stop()
  workers[worker] = nil
  return complaint ~= "" and complaint or nil
end

function world.kill_worker(worker)
  worker:signal "KILL"
  worker:wait(5)
  worker:stop()
  workers[worker] = nil
end

--- Ends everything that still runs.
function world.close()
  for worker in pairs(workers) do worker:stop() end
  workers = {}
  if links then links:stop() end
  if balancer then balancer:stop() end
end

--- A folder for one run.
function world.folder(fault)
  local path = folder .. "/" .. fault:gsub("[^%w]+", "-")
  run("rm -rf " .. quote(path), 20)
  run("mkdir -p " .. quote(path), 20)
  return path
end

return world

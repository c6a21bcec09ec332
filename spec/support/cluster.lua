-- What the specs against a three-node cluster share (scripts/with-broker cluster), and a second broker beside it.
local broker = require "support.broker"
local process = require "support.process"

local cluster = { urls = {}, management = {} }

for url in (os.getenv "AMQP_URLS" or ""):gmatch "[^,]+" do cluster.urls[#cluster.urls + 1] = url end
for url in (os.getenv "AMQP_MANAGEMENT_URLS" or ""):gmatch "[^,]+" do
  cluster.management[#cluster.management + 1] = url
end

--- Why these specs cannot run; nil where they can.
function cluster.none()
  if broker.name and os.getenv "MOONRABBIT_BROKER_KIND" == "cluster" and #cluster.urls == 3 then return nil end
  return "needs a cluster of its own: scripts/with-broker cluster, or scripts/test cluster"
end

local function run(arguments)
  local pipe = io.popen("scripts/broker " .. arguments .. " 2>&1; echo rc=$?")
  local output = pipe:read "*a"
  pipe:close()
  if output:match "rc=(%d+)%s*$" ~= "0" then error("scripts/broker " .. arguments .. ": " .. output, 2) end
  return (output:gsub("rc=%d+%s*$", ""))
end

--- "kill", "stop", "restart", "pause" or "resume" a node. The loop stands still meanwhile.
function cluster.node(command, node)
  return run(("%s --name %s --node %d"):format(command, broker.name, node))
end

--- The same beside the loop; answers a function that tells whether it is done.
function cluster.node_in_background(command, node)
  local running = process.start({ "scripts/broker", command, "--name", broker.name, "--node", node }, { raw = true })
  return function() return running:code() ~= nil end
end

--- "rabbit@host" of node K.
function cluster.node_name(node)
  return ("%s-%d@localhost"):format(broker.name, node)
end

--- Which node a connection is to: 1, 2 or 3.
function cluster.node_of(conn)
  for i, url in ipairs(cluster.urls) do
    if url:find(conn.endpoint, 1, true) then return i end
  end
end

--- A URI of a node with other credentials or query.
function cluster.uri(node, user, query)
  return (cluster.urls[node]:gsub("guest:guest", user or "guest:guest")) .. (query and "?" .. query or "")
end

local second

--- A broker of its own beside the cluster, with TLS: { url, tls_url, tls_dir, management }. Started once; it ends with
--- the cluster that this process was started for.
function cluster.second()
  if second then return second end
  local name = broker.name .. "_b"
  run(("start tls --name %s --owner $PPID --plugins rabbitmq_federation_management,rabbitmq_shovel_management")
    :format(name))
  local env = run("env --name " .. name)
  local function value(key) return env:match("export " .. key .. "='([^']*)'") end
  second = {
    name = name, url = value "AMQP_URL", tls_url = value "AMQPS_URL", tls_dir = value "MOONRABBIT_TLS_DIR",
    management = value "AMQP_MANAGEMENT_URL",
  }
  function second.ctl(command) return run(("%s --name %s"):format(command, name)) end
  return second
end

--- Where the leader of a queue and its members are; nil while the management API answers 500, as it may amid a change.
function cluster.leader(api, queue)
  local found, err = api:leader("/", queue)
  if not found then assert(err.temporary, err) end
  return found
end

return cluster

--- moonrabbit doctor --cluster: whether the management API knows the cluster, and whether each node can be used from
-- here, with the same user, vhost and TLS.

local api = require "moonrabbit.cli.api"
local connect = require "moonrabbit.cli.connect"
local discovery = require "moonrabbit.cluster.discovery"
local exit = require "moonrabbit.cli.exit"

local cluster = {}

--- Adds the options to the command.
function cluster.build(command)
  command:flag "--cluster" :description("Ask the management API for the other nodes, and connect to each: "
    .. "can all be used from here?")
  api.add_option(command)
end

local function api_advice(err)
  if err.kind == "auth" then
    return "the user needs the tag 'monitoring': rabbitmqctl set_user_tags USER monitoring"
  elseif err.kind == "refused" or err.kind == "timeout" then
    return "is the plugin enabled (rabbitmq-plugins enable rabbitmq_management)? Where it is: --management URL"
  end
end

-- The nodes as the API has them, and where they say that they listen.
local function learn(args, patient)
  local client, problem = api.client(args, patient.app and patient.parsed)
  if not client then return nil, nil, { kind = "protocol", message = problem } end
  local overview, err = client:overview()
  if not overview then return nil, nil, err end
  local nodes
  nodes, err = client:nodes()
  if not nodes then return nil, nil, err end
  return nodes, discovery.nodes(overview, nodes, client._host)
end

-- The patient's own options, for another address.
local function options_for(patient, where)
  local parsed, tls = patient.parsed, nil
  local host = where.host:find(":", 1, true) and "[" .. where.host .. "]" or where.host
  if parsed.tls then
    tls = {}
    for name, value in pairs(parsed.tls) do tls[name] = value end
    if tls.server_name == parsed.host then tls.server_name = where.host end
  end
  return {
    uri = ("%s://%s:%d/"):format(parsed.tls and "amqps" or "amqp", host, where.port), tls = tls,
    user = parsed.user, password = parsed.password, vhost = parsed.vhost, mechanism = parsed.mechanism,
    name = "moonrabbit doctor", timeout = patient.timeout, connect_timeout = patient.timeout, reconnect = false,
  }
end

local function reach(report, patient, name, where)
  local label = ("%s at %s:%d"):format(name, where.host, where.port)
  local began = connect.now()
  local conn, err = require("moonrabbit").connect(options_for(patient, where))
  if not conn then
    return report:fail("node", connect.exit_code(err, true), ("%s: %s"):format(label, tostring(err)),
      "clients that fail over to it will not get in from here", { node = name })
  end
  local took = connect.now() - began
  conn:close(patient.timeout)
  return report:pass("node", ("%s in %.0f ms"):format(label, took * 1000), { node = name, seconds = took })
end

local function look_at(report, patient, node, found)
  local name = tostring(node.name)
  if node.running ~= true then
    return report:fail("node", exit.failed, name .. " is down",
      "start it; or, when it will never come back: rabbitmqctl forget_cluster_node " .. name, { node = name })
  end
  for field, what in pairs { mem_alarm = "memory", disk_free_alarm = "disk" } do
    if node[field] == true then
      report:fail("node", exit.failed, ("%s has a %s alarm: nobody can publish in the whole cluster"):format(name,
        what), nil, { node = name })
    end
  end
  local kind = patient.parsed.tls and "tls" or "plain"
  local where = found[name] and found[name].addresses[kind]
  if not where then
    return report:fail("node", exit.failed, name .. " names no address that this machine could use" ..
      (kind == "tls" and " with TLS" or ""), "does it listen on its loopback only?", { node = name })
  end
  return reach(report, patient, name, where)
end

--- Looks at each node; adds to the report what it finds.
function cluster.look(report, patient, args)
  local nodes, found, err = learn(args, patient)
  if not nodes then
    return report:fail("cluster", connect.exit_code(err, true), tostring(err.message or err), api_advice(err))
  end
  report:pass("cluster", #nodes == 1 and "one node" or #nodes .. " nodes", { nodes = #nodes })
  table.sort(nodes, function(a, b) return tostring(a.name) < tostring(b.name) end)
  for _, node in ipairs(nodes) do look_at(report, patient, node, found) end
end

return cluster

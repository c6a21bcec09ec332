--- moonrabbit cluster status

local api = require "moonrabbit.cli.api"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local cluster = {
  summary = "Show the nodes of a cluster, its alarms and where queues are led.",
  epilog = "Exits with 1 when a node is down, an alarm is raised, or a queue lacks a leader or copies in sync.",
}

function cluster.build(command, common)
  command:require_command(true)
  local status = command:command "status" :summary "What runs, what is led where, and what is not well."
  api.add_option(status)
  common(status)
end

local function tell(ok, step, text, data)
  data.step, data.ok, data.text = step, ok, text
  output.result(data, ("%s %-10s%s"):format(ok and "✓" or "✗", step, text))
  return ok
end

local function nodes(client)
  local list, err = client:nodes()
  if not list then return nil, err end
  local well = true
  for _, node in ipairs(list) do
    local problems = {}
    if node.running ~= true then problems[#problems + 1] = "down" end
    if node.mem_alarm == true then problems[#problems + 1] = "memory alarm" end
    if node.disk_free_alarm == true then problems[#problems + 1] = "disk alarm" end
    if type(node.partitions) == "table" and #node.partitions > 0 then problems[#problems + 1] = "partitioned" end
    local text = tostring(node.name) .. (#problems > 0 and ": " .. table.concat(problems, ", ") or " runs")
    well = tell(#problems == 0, "node", text, { node = node.name, problems = problems }) and well
  end
  return well
end

local function length(list) return type(list) == "table" and #list or 0 end

-- What is wrong with a queue; nil when nothing is.
local function ailment(queue)
  if queue.state == "down" or queue.state == "stopped" or queue.state == "crashed" then return "is " .. queue.state end
  if not (queue.leader or queue.node) then return "has no leader" end
  if queue.members and length(queue.online) < length(queue.members) then
    return ("%d of %d members are there"):format(length(queue.online), length(queue.members))
  end
  if length(queue.synchronised_slave_nodes) < length(queue.slave_nodes) then
    return ("%d of %d mirrors are in sync"):format(length(queue.synchronised_slave_nodes), length(queue.slave_nodes))
  end
end

local function queues(client)
  local list, err = client:queues { columns = { "name", "vhost", "type", "node", "leader", "members", "online",
    "slave_nodes", "synchronised_slave_nodes", "state" } }
  if not list then return nil, err end
  local well, led, names = true, {}, {}
  for _, queue in ipairs(list) do
    local problem = ailment(queue)
    if problem then
      well = tell(false, "queue", ("%s in %s %s"):format(tostring(queue.name), tostring(queue.vhost), problem),
        { queue = queue.name, vhost = queue.vhost })
    end
    local leader = tostring(queue.leader or queue.node)
    if not led[leader] then names[#names + 1] = leader end
    led[leader] = (led[leader] or 0) + 1
  end
  table.sort(names)
  for i, name in ipairs(names) do names[i] = ("%d at %s"):format(led[name], name) end
  tell(true, "queues", #names > 0 and "leaders: " .. table.concat(names, ", ") or "none", { leaders = led })
  return well
end

function cluster.run(args)
  local client, code = api.open(args)
  if not client then return code end
  local overview, err = client:overview()
  if not overview then return api.fail(err) end
  local name, version = tostring(overview.cluster_name), tostring(overview.rabbitmq_version)
  tell(true, "cluster", ("%s, RabbitMQ %s"):format(name, version), { cluster = name, version = version })
  local well = true
  for _, look in ipairs { nodes, queues } do
    local fine, problem = look(client)
    if fine == nil then return api.fail(problem) end
    well = well and fine
  end
  return well and exit.ok or exit.failed
end

return cluster

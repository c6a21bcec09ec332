--- Declares what an app says about exchanges, queues and bindings.
-- @module moonrabbit.app.topology

local errors = require "moonrabbit.errors"

local topology = {}

local function with(arguments, name, value)
  local all = {}
  for key, each in pairs(arguments or {}) do all[key] = each end
  all[name] = value
  return all
end

local function sorted(map)
  local names = {}
  for name in pairs(map) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- Everything that is to be declared, in order: a list of { "exchange", name, options }, { "queue", name, options },
--- { "bind_exchange" | "bind_queue", destination, source, key, options }.
---@param plan table from moonrabbit.app.plan
---@return table[]
function topology.steps(plan)
  local steps = {}
  local function add(...) steps[#steps + 1] = { ... } end
  for _, name in ipairs(sorted(plan.exchanges)) do
    local exchange = plan.exchanges[name]
    local arguments = exchange.arguments
    if exchange.alternate then arguments = with(arguments, "alternate-exchange", exchange.alternate) end
    add("exchange", name, {
      type = exchange.type or "topic", durable = exchange.durable ~= false, auto_delete = exchange.auto_delete,
      internal = exchange.internal, passive = exchange.passive, arguments = arguments,
    })
  end
  for _, name in ipairs(sorted(plan.queues)) do
    local queue = plan.queues[name]
    local arguments = queue.arguments
    if queue.type and queue.type ~= "classic" then arguments = with(arguments, "x-queue-type", queue.type) end
    add("queue", name, {
      durable = queue.durable ~= false, exclusive = queue.exclusive, auto_delete = queue.auto_delete,
      passive = queue.passive, arguments = arguments,
    })
  end
  for _, name in ipairs(sorted(plan.exchanges)) do
    for _, bind in ipairs(plan.exchanges[name].bind or {}) do
      add("bind_exchange", name, bind[1], bind[2] or "", { arguments = bind.arguments })
    end
  end
  for _, name in ipairs(sorted(plan.queues)) do
    for _, bind in ipairs(plan.queues[name].bind or {}) do
      add("bind_queue", name, bind[1], bind[2] or "", { arguments = bind.arguments })
    end
  end
  return steps
end

local methods = {
  exchange = "exchange_declare", queue = "queue_declare", bind_exchange = "exchange_bind", bind_queue = "queue_bind",
}

-- An error that says what it is about; the given one may be its connection's, which others are told too.
local function about(err, step)
  local own = errors.copy(err)
  own.message = ("%s '%s': %s"):format(step[1]:gsub("_", " "), step[2], err.message)
  return own
end

--- Declares them.
---@param channel moonrabbit.Channel
---@param steps table[]
---@return true|nil, moonrabbit.Error?
function topology.declare(channel, steps)
  for _, step in ipairs(steps) do
    local ok, err = channel[methods[step[1]]](channel, step[2], step[3], step[4], step[5])
    if not ok then return nil, about(err, step) end
  end
  return true
end

return topology

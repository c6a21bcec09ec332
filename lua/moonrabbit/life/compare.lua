--- What of an app's topology is there, is missing, or is there with other properties.
--
-- Each entity is looked up passively, which changes nothing. One that is there is then declared as the app would: the
-- broker does nothing when it is the same, and says what differs when it is not. Bindings cannot be looked up over AMQP:
-- with the management API they are, else they are "unknown".
-- @module moonrabbit.life.compare

local compare = {}

---@alias moonrabbit.life.Difference { step: table, state: "same"|"missing"|"differs"|"unknown"|"refused", text: string? }

local methods = { exchange = "exchange_declare", queue = "queue_declare" }

-- On a channel of its own: an error closes it.
local function try(connection, step, passive)
  local channel, err = connection:channel()
  if not channel then return nil, err end
  local opts = passive and { passive = true } or step[3]
  local ok
  ok, err = channel[methods[step[1]]](channel, step[2], opts)
  channel:close()
  return ok and true or nil, err
end

local function look(connection, step)
  local ok, err = try(connection, step, true)
  if not ok then
    if err.code == 404 then return "missing" end
    if err.code == 405 then return "differs", "it is exclusive to another connection" end
    if err.code == 403 then return "refused", err.message end
    return nil, err
  end
  if step[3].passive then return "same" end
  ok, err = try(connection, step, false)
  if ok then return "same" end
  if err.code == 406 then return "differs", err.message end
  if err.code == 403 then return "unknown", "it is there; this user may not declare it, so it cannot be compared" end
  return nil, err
end

local function binding_id(kind, destination, source, key)
  return table.concat({ kind, destination, source, key or "" }, "\0")
end

-- The set of bindings that are there; nil without a management API.
local function bindings_there(api, vhost)
  if not api then return nil end
  local list, err = api:bindings(vhost)
  if not list then return nil, err end
  local there = {}
  for _, each in ipairs(list) do
    local kind = each.destination_type == "queue" and "bind_queue" or "bind_exchange"
    there[binding_id(kind, each.destination, each.source, each.routing_key)] = true
  end
  return there
end

--- Compares steps with a broker; nil, err when it cannot be asked. Nothing is changed.
---@param connection moonrabbit.Connection
---@param steps table[]
---@param api moonrabbit.Management?
---@param vhost string
---@return moonrabbit.life.Difference[]|nil, moonrabbit.Error?
function compare.run(connection, steps, api, vhost)
  local there, err = bindings_there(api, vhost)
  if err then return nil, err end
  local list = {}
  for i, step in ipairs(steps) do
    local state, text
    if methods[step[1]] then
      state, text = look(connection, step)
      if not state then return nil, text end
    elseif there then
      state = there[binding_id(step[1], step[2], step[3], step[4])] and "same" or "missing"
    else
      state = "unknown"
    end
    list[i] = { step = step, state = state, text = text }
  end
  return list
end

return compare

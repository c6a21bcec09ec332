--- Connections as metrics: what happens to them is counted, what they hold is looked at when a page is written.
-- @module moonrabbit.metrics.connections

local connections = {}

local function kind_of(err) return type(err) == "table" and err.kind or "closed" end

-- What is counted as it happens: event -> function (families, name, ...).
local counted = {
  recovering = function(families, name, err) families.connection_losses_total:with(name, kind_of(err)):inc() end,
  recovered = function(families, name) families.connection_recoveries_total:with(name):inc() end,
  recovery_error = function(families, name, entity)
    families.recovery_errors_total:with(name, type(entity) == "table" and entity.kind or "unknown"):inc()
  end,
  consumer_recovered = function(families, name) families.consumer_recoveries_total:with(name):inc() end,
  suspect = function(families, name, strategy) families.suspicions_total:with(name, strategy):inc() end,
  closed = function(families, name, err)
    if err and err.kind ~= "closed" then families.connection_losses_total:with(name, kind_of(err)):inc() end
  end,
}

local gauges = {
  "connections", "connection_up", "connection_blocked", "channels", "output_buffer_bytes", "channel_unconfirmed",
  "channel_unsettled",
}

-- What one connection holds now.
local function look(connection, add)
  local session = connection._session
  add("connections", 1)
  if connection:state() ~= "open" then return end
  add("connection_up", 1)
  if connection:blocked() then add("connection_blocked", 1) end
  add("output_buffer_bytes", session.engine:pending())
  for channel in pairs(session.channels) do
    add("channels", 1)
    add("channel_unconfirmed", channel._core:unconfirmed())
    add("channel_unsettled", channel._core:unsettled())
  end
end

local Connections = {}
Connections.__index = Connections

function connections.new(families, registry)
  local self = setmetatable({ families = families, watched = {} }, Connections)
  registry:collect(function() self:collect() end)
  return self
end

-- Calls fn when somebody here has closed it, also where the broker went meanwhile: one that could not be brought back
-- stays on the page, as one that is not up.
local function when_closed_here(connection, fn)
  local closing
  return connection:on("state", function(state, err)
    if state == "closing" then closing = true end
    local stopped = type(err) == "table" and err.kind == "closed" and err.temporary == false -- as it was coming back
    if state == "closed" and (closing or stopped) then fn() end
  end)
end

--- Several connections of one name are added up.
function Connections:watch(connection, name)
  local offs = {}
  for event, fn in pairs(counted) do
    offs[#offs + 1] = connection:on(event, function(...) fn(self.families, name, ...) end)
  end
  self.families.connection_recoveries_total:with(name)
  self.watched[connection] = name
  local function off()
    self.watched[connection] = nil
    for _, each in ipairs(offs) do each() end
    for _, gauge in ipairs(gauges) do self.families[gauge]:remove(name) end
  end
  offs[#offs + 1] = when_closed_here(connection, off)
  return off
end

function Connections:collect()
  local seen = {}
  for _, name in pairs(self.watched) do
    if not seen[name] then
      seen[name] = true
      for _, gauge in ipairs(gauges) do self.families[gauge]:with(name):set(0) end
    end
  end
  for connection, name in pairs(self.watched) do
    look(connection, function(gauge, n) self.families[gauge]:with(name):inc(n) end)
  end
end

return connections

--- What was declared over a connection, on whatever channel, and is to be there again when it comes back.
--
-- Only what the broker has confirmed (or was told with no_wait) stands here, and passive declarations do not.
-- What is deleted or unbound over this connection is forgotten, with all that the broker removes by itself
-- then: bindings of what is gone, an auto-delete exchange without bindings, an auto-delete queue whose last
-- consumer here was cancelled.
-- @module moonrabbit.connection.record

local Record = {}
Record.__index = Record

--- The order in which things are declared again.
local KINDS = { exchange = 1, queue = 2, exchange_binding = 3, queue_binding = 4 }

function Record.new()
  return setmetatable({
    serial = 0,
    exchanges = {}, queues = {},            -- name -> entity
    bindings = {},                          -- key -> entity
    into = {}, from = {},                   -- kind and destination, source -> { key = entity }
  }, Record)
end

-- ---- Keys -------------------------------------------------------------------------------------------

-- A value as text, the same for tables with the same entries.
local function canonical(value)
  local kind = type(value)
  if kind ~= "table" then return kind:sub(1, 1) .. tostring(value) end
  local parts = {}
  for key, each in pairs(value) do parts[#parts + 1] = canonical(key) .. "=" .. canonical(each) end
  table.sort(parts)
  return "{" .. table.concat(parts, "\1") .. "}"
end

local function copy(value)
  if type(value) ~= "table" then return value end
  local new = {}
  for key, each in pairs(value) do new[key] = copy(each) end
  return new
end

local function key_of(binding)
  return table.concat({ binding.kind, binding.destination, binding.source, binding.routing_key,
    canonical(binding.arguments or {}) }, "\0")
end

local function index(lists, name, key, entity)
  local list = lists[name]
  if not list then
    if not entity then return end
    list = {}
    lists[name] = list
  end
  list[key] = entity
  if not entity and next(list) == nil then lists[name] = nil end
end

local function into_name(kind, destination) return kind .. "\0" .. destination end

-- ---- Declared ---------------------------------------------------------------------------------------

local function number(self, entity)
  self.serial = self.serial + 1
  entity.serial = self.serial
  return entity
end

--- An exchange was declared. `fields`: those of exchange.declare.
function Record:exchange_declared(fields)
  if fields.passive then return end
  local old = self.exchanges[fields.exchange]
  local entity = number(self, {
    kind = "exchange", name = fields.exchange, type = fields.type, durable = fields.durable,
    auto_delete = fields.auto_delete, internal = fields.internal, arguments = copy(fields.arguments),
  })
  if old then entity.serial = old.serial end
  self.exchanges[fields.exchange] = entity
end

--- A queue was declared. `name`: as the broker says; fields: those of queue.declare.
function Record:queue_declared(name, fields)
  if fields.passive then return end
  local old = self.queues[name]
  local entity = number(self, {
    kind = "queue", name = name, durable = fields.durable, exclusive = fields.exclusive,
    auto_delete = fields.auto_delete, arguments = copy(fields.arguments), server_named = fields.queue == "",
  })
  if old then
    entity.serial = old.serial
    entity.server_named = old.server_named
  end
  self.queues[name] = entity
end

--- Something was bound. kind: "queue_binding" or "exchange_binding".
function Record:bound(kind, destination, source, routing_key, arguments)
  if source == "" then return end
  local entity = number(self, {
    kind = kind, destination = destination, source = source, routing_key = routing_key, arguments = copy(arguments),
  })
  local key = key_of(entity)
  if self.bindings[key] then entity.serial = self.bindings[key].serial end
  self.bindings[key] = entity
  index(self.into, into_name(kind, destination), key, entity)
  index(self.from, source, key, entity)
end

-- ---- Forgotten --------------------------------------------------------------------------------------

local function drop_binding(self, key)
  local entity = self.bindings[key]
  if not entity then return end
  entity.gone = true
  self.bindings[key] = nil
  index(self.into, into_name(entity.kind, entity.destination), key)
  index(self.from, entity.source, key)
  local exchange = self.exchanges[entity.source]
  if exchange and exchange.auto_delete and not self.from[entity.source] then self:exchange_deleted(entity.source) end
end

local function drop_all(self, list)
  local keys = {}
  for key in pairs(list or {}) do keys[#keys + 1] = key end
  for _, key in ipairs(keys) do drop_binding(self, key) end
end

--- Something was unbound.
function Record:unbound(kind, destination, source, routing_key, arguments)
  drop_binding(self, key_of { kind = kind, destination = destination, source = source, routing_key = routing_key,
    arguments = arguments })
end

function Record:exchange_deleted(name)
  local entity = self.exchanges[name]
  if entity then entity.gone = true end
  self.exchanges[name] = nil
  drop_all(self, self.into[into_name("exchange_binding", name)])
  drop_all(self, self.from[name])
end

function Record:queue_deleted(name)
  local entity = self.queues[name]
  if entity then entity.gone = true end
  self.queues[name] = nil
  drop_all(self, self.into[into_name("queue_binding", name)])
end

--- The last consumer of this connection on a queue was cancelled.
function Record:unused(name)
  local queue = self.queues[name]
  if queue and queue.auto_delete then self:queue_deleted(name) end
end

--- The broker gave a queue another name.
function Record:renamed(old, new)
  local queue = self.queues[old]
  self.queues[old], self.queues[new] = nil, queue
  queue.name = new
  local moved = {}
  for key, entity in pairs(self.into[into_name("queue_binding", old)] or {}) do moved[key] = entity end
  for key, entity in pairs(moved) do
    self.bindings[key] = nil
    index(self.into, into_name(entity.kind, old), key)
    index(self.from, entity.source, key)
    entity.destination = new
    if entity.routing_key == old then entity.routing_key = new end
    key = key_of(entity)
    self.bindings[key] = entity
    index(self.into, into_name(entity.kind, new), key, entity)
    index(self.from, entity.source, key, entity)
  end
end

-- ---- Declared again ---------------------------------------------------------------------------------

function Record.before(a, b)
  local kind_a, kind_b = KINDS[a.kind], KINDS[b.kind]
  if kind_a ~= kind_b then return kind_a < kind_b end
  return a.serial < b.serial
end

--- Everything, in the order in which it is to be declared.
---@return table[]
function Record:all()
  local list = {}
  for _, set in ipairs { self.exchanges, self.queues, self.bindings } do
    for _, entity in pairs(set) do list[#list + 1] = entity end
  end
  table.sort(list, Record.before)
  return list
end

-- What an exchange is fed by, and what feeds that.
local function sources(self, name, seen, list)
  if seen[name] then return end
  seen[name] = true
  list[#list + 1] = self.exchanges[name]
  for _, binding in pairs(self.into[into_name("exchange_binding", name)] or {}) do
    list[#list + 1] = binding
    sources(self, binding.source, seen, list)
  end
end

--- A queue and everything by which messages reach it, in order; empty when it was not declared here.
---@return table[]
function Record:around(name)
  local queue = self.queues[name]
  if not queue then return {} end
  local list, seen = { queue }, {}
  for _, binding in pairs(self.into[into_name("queue_binding", name)] or {}) do
    list[#list + 1] = binding
    sources(self, binding.source, seen, list)
  end
  table.sort(list, Record.before)
  return list
end

--- What an entity is called, for people.
function Record.label(entity)
  if entity.kind == "exchange" or entity.kind == "queue" then return ("%s '%s'"):format(entity.kind, entity.name) end
  if entity.kind == "consumer" then return ("consumer '%s' on '%s'"):format(entity.tag, entity.queue) end
  if entity.kind == "channel" then return "channel" end
  return ("binding of '%s' to '%s' by '%s'"):format(entity.destination, entity.source, entity.routing_key)
end

--- The method that declares an entity, and its fields.
---@return string method, table fields
function Record.declaration(entity)
  if entity.kind == "exchange" then
    return "exchange.declare", {
      exchange = entity.name, type = entity.type, durable = entity.durable, auto_delete = entity.auto_delete,
      internal = entity.internal, arguments = entity.arguments,
    }
  elseif entity.kind == "queue" then
    return "queue.declare", {
      queue = entity.server_named and "" or entity.name, durable = entity.durable, exclusive = entity.exclusive,
      auto_delete = entity.auto_delete, arguments = entity.arguments,
    }
  elseif entity.kind == "exchange_binding" then
    return "exchange.bind", {
      destination = entity.destination, source = entity.source, routing_key = entity.routing_key,
      arguments = entity.arguments,
    }
  end
  return "queue.bind", {
    queue = entity.destination, exchange = entity.source, routing_key = entity.routing_key,
    arguments = entity.arguments,
  }
end

return Record

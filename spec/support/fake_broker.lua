--- The broker's side of a connection, in memory: builds frames for an engine of moonrabbit.core and
-- takes apart what the engine sends. No sockets, and a clock that the spec sets.

local core = require "moonrabbit.core"

local char, byte, floor = string.char, string.byte, math.floor

local fake = {}

-- ---- Building ---------------------------------------------------------------------------------------

local function uint(n, size)
  local bytes = {}
  for i = size, 1, -1 do
    bytes[i] = char(n % 256)
    n = floor(n / 256)
  end
  return table.concat(bytes)
end

function fake.u8(n) return uint(n, 1) end
function fake.u16(n) return uint(n, 2) end
function fake.u32(n) return uint(n, 4) end
function fake.u64(n) return uint(n, 8) end
function fake.short(s) return char(#s) .. s end
function fake.long(s) return uint(#s, 4) .. s end

local u8, u16, u32, u64, short, long = fake.u8, fake.u16, fake.u32, fake.u64, fake.short, fake.long

function fake.frame(kind, channel, payload)
  return u8(kind) .. u16(channel) .. u32(#payload) .. payload .. "\206"
end

function fake.method(channel, class, method, arguments)
  return fake.frame(1, channel, u16(class) .. u16(method) .. (arguments or ""))
end

--- Content header and body frames. `properties` is raw (flags and list).
function fake.content(channel, body, properties, frame_max)
  local most = (frame_max or 131072) - 8
  local parts = { fake.frame(2, channel, u16(60) .. u16(0) .. u64(#body) .. (properties or u16(0))) }
  for at = 1, #body, most do
    parts[#parts + 1] = fake.frame(3, channel, body:sub(at, at + most - 1))
  end
  return table.concat(parts)
end

function fake.deliver(channel, tag, delivery_tag, body, opts)
  opts = opts or {}
  return fake.method(channel, 60, 60, short(tag) .. u64(delivery_tag) .. u8(opts.redelivered and 1 or 0)
      .. short(opts.exchange or "") .. short(opts.routing_key or "q"))
    .. fake.content(channel, body, opts.properties, opts.frame_max)
end

function fake.returned(channel, body, opts)
  return fake.method(channel, 60, 50, u16(opts.code or 312) .. short(opts.text or "NO_ROUTE")
      .. short(opts.exchange or "") .. short(opts.routing_key or "q"))
    .. fake.content(channel, body, opts.properties)
end

function fake.ack(channel, tag, multiple) return fake.method(channel, 60, 80, u64(tag) .. u8(multiple and 1 or 0)) end
function fake.nack(channel, tag, multiple) return fake.method(channel, 60, 120, u64(tag) .. u8(multiple and 1 or 0)) end

-- ---- Taking apart -----------------------------------------------------------------------------------

local function number(s, at, size)
  local n = 0
  for i = at, at + size - 1 do n = n * 256 + byte(s, i) end
  return n
end
fake.number = number

--- The frames in `bytes`: { kind, channel, payload, id = "60.40" of a method, args }.
function fake.frames(bytes)
  local list, at = {}, 1
  if bytes:sub(1, 4) == "AMQP" then at = 9 end
  while at <= #bytes do
    local kind, channel, len = byte(bytes, at), number(bytes, at + 1, 2), number(bytes, at + 3, 4)
    local payload = bytes:sub(at + 7, at + 6 + len)
    assert(byte(bytes, at + 7 + len) == 206, "a frame without its end")
    local frame = { kind = kind, channel = channel, payload = payload }
    if kind == 1 then
      frame.id = number(payload, 1, 2) .. "." .. number(payload, 3, 2)
      frame.args = payload:sub(5)
    end
    list[#list + 1] = frame
    at = at + 8 + len
  end
  return list
end

-- ---- One connection ---------------------------------------------------------------------------------

local Broker = {}
Broker.__index = Broker

--- A broker and its engine, before the handshake. config: overrides of the engine's.
function fake.new(config)
  local all = { vhost = "/", user = "guest", password = "secret", heartbeat = 0 }
  for key, value in pairs(config or {}) do all[key] = value end
  return setmetatable({ engine = core.engine(all), now = 0, events = {}, owners = {} }, Broker)
end

--- Feeds bytes as the broker's; pumps whenever the engine has no room. Events are kept in `events`.
function Broker:send(...)
  local bytes = table.concat { ... }
  while #bytes > 0 do
    local taken = self.engine:feed(bytes, self.now)
    bytes = bytes:sub(taken + 1)
    if not self:pump() and taken == 0 then break end
  end
  return #bytes
end

--- Keeps what the engine has to say. Returns whether there was anything.
function Broker:pump()
  local any = false
  while true do
    local event = { self.engine:pump() }
    if event[1] == nil then return any end
    any = true
    self.events[#self.events + 1] = event
  end
end

--- The events since the last call.
function Broker:take()
  local events = self.events
  self.events = {}
  return events
end

--- The one event since the last call.
function Broker:one()
  local events = self:take()
  assert(#events == 1, "one event expected, got " .. #events)
  return events[1]
end

--- The frames that the engine has sent since the last call.
function Broker:sent() return fake.frames(self.engine:drain(self.now)) end

function Broker.start_frame(_, properties, mechanisms)
  return fake.method(0, 10, 10, "\0\9" .. (properties or core.encode_table { product = "Fake" })
    .. long(mechanisms or "PLAIN AMQPLAIN EXTERNAL") .. long "en_US")
end

function Broker:open(opts)
  opts = opts or {}
  self.engine:start(self.now)
  assert(self.engine:drain(self.now) == "AMQP\0\0\9\1")
  self:send(self:start_frame(opts.properties))
  assert(self:sent()[1].id == "10.11")
  self:send(fake.method(0, 10, 30, u16(opts.channel_max or 2047) .. u32(opts.frame_max or 131072)
    .. u16(opts.heartbeat or 0)))
  self:sent()
  self:send(fake.method(0, 10, 41, short ""))
  assert(self:one()[1] == "open")
  return self
end

--- An open channel; with confirms when `confirm`. Returns it and its owner.
function Broker:channel(confirm)
  local owner = {}
  local channel = assert(self.engine:open_channel(owner))
  owner.channel = channel
  self:send(fake.method(channel:id(), 20, 11, long ""))
  if confirm then
    assert(channel:call("confirm.select", {}))
    self:send(fake.method(channel:id(), 85, 11))
  end
  self:take()
  self:sent()
  return channel, owner
end

--- A consumer: its DeliveryQueue.
function Broker:consumer(channel, tag, fields)
  local all = { queue = "q", consumer_tag = tag }
  for key, value in pairs(fields or {}) do all[key] = value end
  local queue = assert(channel:consume(all))
  self:send(fake.method(channel:id(), 60, 21, short(tag)))
  self:take()
  self:sent()
  return queue
end

return fake

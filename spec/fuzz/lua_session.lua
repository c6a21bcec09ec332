--- What lua_session_fuzz.c calls with each input: a session as Lua sees it. The first byte says how far it has come,
-- then each byte is something that a broker sends or a program does, with its operands behind it. Whatever comes: no
-- throw, only the events of core.d.lua, everything that they bring readable, nothing after the end, and what was
-- settled stays as it is.

local core = require "moonrabbit.core"
local fake = require "spec.support.fake_broker"

local unpack = table.unpack or unpack -- luacheck: ignore 143 113
local u8, u16, u32, u64, short, long = fake.u8, fake.u16, fake.u32, fake.u64, fake.short, fake.long

-- ---- The input --------------------------------------------------------------------------------------

local Input = {}
Input.__index = Input

function Input:byte()
  local b = self.bytes:byte(self.at) or 0
  self.at = self.at + 1
  return b
end

function Input:string()
  local n = self:byte()
  local s = self.bytes:sub(self.at, self.at + n - 1)
  self.at = self.at + n
  return s
end

function Input:over() return self.at > #self.bytes end

-- ---- Looking at everything --------------------------------------------------------------------------

local function look(value, depth)
  local kind = type(value)
  assert(kind ~= "nil" and kind ~= "function" and depth < 40, "a value that no table holds")
  assert(tostring(value))
  if kind == "userdata" and value ~= core.null then
    assert(type(value.type) == "string" and value == value)
  elseif kind == "table" then
    for name, inner in pairs(value) do
      assert(name ~= "moonrabbit-seq" or depth > 2, "the number of a publish is shown")
      look(name, depth + 1)
      look(inner, depth + 1)
    end
  end
end

local fields = {
  "body", "exchange", "routing_key", "redelivered", "delivery_tag", "consumer_tag", "message_count", "reply_code",
  "reply_text", "message_id",
}

local function look_at_message(message)
  assert(core.is_message(message) and tostring(message))
  assert(type(message.body) == "string" and type(message.routing_key) == "string")
  for _, name in ipairs(fields) do
    local value = message[name]
    if value ~= nil then look(value, 1) end
  end
  look(message.properties, 1)
  assert(message.properties.headers == nil and next(message.headers) == nil
    or message.properties.headers == message.headers)
  assert(message.message_id == message.properties.message_id)
  local key = core.key_without(message, "a")
  assert(key == nil and message.headers.a ~= nil or key == message.routing_key)
end

-- ---- Events -----------------------------------------------------------------------------------------

local function is_owner(owner) assert(type(owner) == "table" and owner.channel) end

local function is_error(err) assert(type(err.kind) == "string" and type(err.text) == "string") end

local expect = {
  open = function() end,
  reply = function(_, owner, method, answer)
    if method ~= "connection.update-secret-ok" then is_owner(owner) end
    if answer then look(answer, 1) end
  end,
  get = function(_, owner, message)
    is_owner(owner)
    look_at_message(message)
  end,
  ["return"] = function(_, owner, message)
    is_owner(owner)
    look_at_message(message)
  end,
  confirm = function(_, owner) is_owner(owner) end,
  failed = function(session, owner, seq, outcome, confirmation)
    is_owner(owner)
    local now, number = core.outcome(confirmation)
    assert(now == outcome and number == seq and session.confirmations[confirmation])
  end,
  deliver = function(_, owner, queue)
    is_owner(owner)
    assert(queue:count() > 0)
  end,
  cancel = function(_, owner, tag)
    is_owner(owner)
    assert(type(tag) == "string")
  end,
  flow = function(_, owner, active)
    is_owner(owner)
    assert(type(active) == "boolean")
  end,
  channel_closed = function(_, owner, err)
    is_owner(owner)
    is_error(err)
  end,
  blocked = function(_, reason) assert(type(reason) == "string") end,
  unblocked = function() end,
  closed = function(session, err)
    is_error(err)
    session.ended = true
  end,
}

local Session = {}
Session.__index = Session

-- What was settled once is what it was; what is not is pending.
local function check_confirmations(self)
  for confirmation, before in pairs(self.confirmations) do
    local outcome, acked = core.outcome(confirmation), core.acked(confirmation)
    assert(before == "pending" or outcome == before, "an outcome has changed")
    if outcome == "acked" then
      assert(acked == true)
    elseif outcome == "pending" then
      assert(acked == false)
    else
      assert(acked == nil)
    end
    self.confirmations[confirmation] = outcome
  end
end

local function take_events(self)
  self.broker:pump()
  for _, event in ipairs(self.broker:take()) do
    assert(not self.ended, "an event after the end")
    assert(expect[event[1]], event[1])(self, unpack(event, 2, 5))
  end
  check_confirmations(self)
end

-- ---- What a broker sends ----------------------------------------------------------------------------

local methods = {
  { 10, 10 }, { 10, 20 }, { 10, 30 }, { 10, 41 }, { 10, 50 }, { 10, 51 }, { 10, 60 }, { 10, 61 }, { 10, 71 },
  { 20, 11 }, { 20, 20 }, { 20, 21 }, { 20, 40 }, { 20, 41 }, { 40, 11 }, { 40, 21 }, { 40, 31 }, { 40, 51 },
  { 50, 11 }, { 50, 21 }, { 50, 31 }, { 50, 41 }, { 50, 51 }, { 60, 11 }, { 60, 21 }, { 60, 30 }, { 60, 31 },
  { 60, 50 }, { 60, 60 }, { 60, 71 }, { 60, 72 }, { 60, 80 }, { 60, 111 }, { 60, 120 }, { 85, 11 }, { 90, 11 },
}

local function channel_number(input) return input:byte() % 4 end

-- Headers and nothing else, with the bytes of any table; or all of it as it comes.
local function some_properties(input)
  if input:byte() % 2 == 0 then return u16(input:byte() * 256 + input:byte()) .. input:string() end
  return u16(0x2000) .. long(input:string())
end

local function numbered(seq) return u16(0x2000) .. core.encode_table { ["moonrabbit-seq"] = core.types.int64(seq) } end

local broker_sends = {
  function(input) return input:string() end,
  function(input) return fake.frame(input:byte(), channel_number(input), input:string()) end,
  function(input)
    local method = methods[input:byte() % #methods + 1]
    return fake.method(method[1] == 10 and 0 or channel_number(input), method[1], method[2], input:string())
  end,
  function(input, session)
    session.tag = session.tag + input:byte() % 3
    local tag = input:byte() % 8 > 0 and "c" or "d"
    return fake.deliver(channel_number(input), tag, session.tag, input:string():rep(input:byte() % 8),
      { properties = some_properties(input), routing_key = input:string() })
  end,
  function(input)
    local properties = input:byte() % 2 == 0 and some_properties(input) or numbered(input:byte())
    return fake.returned(channel_number(input), input:string(), { properties = properties })
  end,
  function(input) return fake.ack(channel_number(input), input:byte(), input:byte() % 2 == 0) end,
  function(input) return fake.nack(channel_number(input), input:byte(), input:byte() % 2 == 0) end,
  function(input, session)
    session.tag = session.tag + 1
    local channel = channel_number(input)
    return fake.method(channel, 60, 71, u64(session.tag) .. u8(0) .. short "x" .. short "k" .. u32(input:byte()))
      .. fake.content(channel, input:string(), some_properties(input))
  end,
  function(input) return fake.method(channel_number(input), 60, 30, short "c" .. u8(input:byte() % 2)) end,
  function(input) return fake.method(channel_number(input), 60, 31, short "c") end,
  function(input)
    return fake.method(channel_number(input), 20, 40, u16(400 + input:byte()) .. short(input:string()) .. u32(0))
  end,
}

-- ---- What a program does ----------------------------------------------------------------------------

local function keep(session, confirmation)
  if type(confirmation) == "userdata" then session.confirmations[confirmation] = "pending" end
end

local kinds = { "ack", "nack", "reject" }

local program_does = {
  function(input, session, owner)
    local message = owner.queue and owner.queue:pop()
    if not message then return end
    look_at_message(message)
    local how = input:byte() % 5
    if how == 0 then core.ack(message)
    elseif how < 3 then core.settle(message, kinds[how + 1], true)
    elseif how == 3 then keep(session, (owner.channel:forward(message, "x", "k", nil, message.headers, { "b" })))
    end -- or it is forgotten
  end,
  function(input, session, owner)
    keep(session, (owner.channel:publish(input:string(), { routing_key = "q", mandatory = input:byte() % 2 == 0 })))
  end,
  function(_, session, owner) keep(session, (owner.channel:publish_route(session.route, "body"))) end,
  function(input, _, owner) owner.channel:settle(input:byte(), kinds[input:byte() % 3 + 1], true) end,
  function(input, _, owner) owner.channel:settle_upto(input:byte(), kinds[input:byte() % 2 + 1], true) end,
  function(_, _, owner) owner.channel:call("basic.cancel", { consumer_tag = "c" }) end,
  function(_, _, owner) if owner.queue then owner.queue:discard() end end,
  function(input, _, owner) owner.channel:get("q", input:byte() % 2 == 0) end,
  function(input, _, owner)
    local calls = { "queue.declare", "exchange.declare", "confirm.select", "basic.recover", "tx.select", "tx.rollback" }
    owner.channel:call(calls[input:byte() % #calls + 1], {})
  end,
  function(_, session, owner)
    if not owner.channel:is_open() or owner.queue then return end
    owner.queue = owner.channel:consume { queue = "q", consumer_tag = "d" }
    session.queues = session.queues + 1
  end,
  function(_, _, owner) owner.channel:close(200, "bye") end,
  function(_, session)
    if session.opened > 20 then return end
    session.opened = session.opened + 1
    local owner = {}
    owner.channel = session.broker.engine:open_channel(owner)
    if owner.channel then session.owners[#session.owners % 3 + 1] = owner end
  end,
  function(_, session) session.broker:sent() end,
  function(input, session)
    local broker = session.broker
    broker.now = broker.now + input:byte() / 16
    broker.engine:tick(broker.now)
  end,
  function() collectgarbage() end,
  function(_, session) session.broker.engine:admit() end,
  function(input, session) session.broker.engine:update_secret(input:string(), "why") end,
  function(input, session) if input:byte() == 99 then session.broker.engine:close(200, "bye") end end,
}

-- ---- A session --------------------------------------------------------------------------------------

local route = core.route({ routing_key = "q" }, true)

-- Two channels: one with confirms, one with a consumer of tag "c".
local function begin(how)
  local broker = fake.new { heartbeat = how % 2 * 10, max_message_size = 20000, max_buffer = 50000 }
  local session = setmetatable({
    broker = broker, owners = {}, confirmations = {}, tag = 0, opened = 0, queues = 0, route = route, ended = false,
  }, Session)
  if how % 16 == 0 then
    broker.engine:start(0)
    return session
  end
  broker:open()
  local _, owner = broker:channel(true)
  session.owners[1] = owner
  for _ = 1, how % 4 do keep(session, (owner.channel:publish("b", { routing_key = "q" }))) end
  local channel
  channel, owner = broker:channel(how % 8 > 4)
  owner.queue = broker:consumer(channel, "c", { no_ack = how % 3 == 0 })
  session.owners[2] = owner
  return session
end

local function step(session, input)
  local op = input:byte()
  if op >= 128 then
    session.broker:send(broker_sends[op % #broker_sends + 1](input, session))
  else
    local owner = session.owners[input:byte() % 3 + 1] or session.owners[1]
    if not owner then return end
    program_does[op % #program_does + 1](input, session, owner)
  end
  take_events(session)
end

return function(bytes)
  local input = setmetatable({ bytes = bytes, at = 1 }, Input)
  local session = begin(input:byte())
  while not input:over() do step(session, input) end
  session.broker.engine:eof "cut"
  take_events(session)
  assert(session.ended, "no end")
  for _, owner in ipairs(session.owners) do assert(not owner.channel:is_open() and owner.channel:unconfirmed() == 0) end
  for confirmation, outcome in pairs(session.confirmations) do
    assert(outcome ~= "pending" and tostring(confirmation))
  end
end

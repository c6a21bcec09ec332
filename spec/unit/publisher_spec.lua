-- The publisher without a broker: its options, its ring, and what it does when channels come and go, on an engine
-- in memory and a clock that stands still.
local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local fake = require "support.fake_broker"
local virtual = require "support.virtual"
local Publisher = require "moonrabbit.publisher"
local Policy = require "moonrabbit.publisher.policy"
local Ring = require "moonrabbit.publisher.ring"
local ids = require "moonrabbit.publisher.ids"
require "moonrabbit.confirmation"

local function fails(text, fn, ...)
  local ok, err = pcall(fn, ...)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(text, 1, true), "'" .. tostring(err) .. "' does not contain '" .. text .. "'")
end

-- ---- A connection without a socket --------------------------------------------------------------------

local Session = {}
Session.__index = Session

function Session.error(_, kind, message, more)
  local fields = more or {}
  fields.kind, fields.message = kind, message
  return errors.new(fields)
end
function Session:refusal(status) return self:error("overflow", "refused: " .. status) end
function Session:touch() self.dirty = true end
function Session.try_flush() end
function Session.block(_, condition, left) condition:wait(left < math.huge and left or nil) end
function Session.try_block(_, condition, left)
  Session.block(_, condition, left)
  return true
end

local World = {}
World.__index = World

local function world()
  local self = setmetatable({ runtime = virtual.new(), log = {} }, World)
  self:connect()
  return self
end

function World:connect()
  self.broker = fake.new(self.config):open()
  self.session = setmetatable({ state = "open", room = self.runtime.condition() }, Session)
end

local Channel = {}
Channel.__index = Channel
function Channel:_watch(hooks) self.hooks = hooks end
function Channel._failure(_, confirmation)
  return errors.new { kind = "closed", message = (core.outcome(confirmation)) }
end
function Channel.close() return true end
function Channel:_renew(err)
  self.renewed = (self.renewed or 0) + 1
  if self.leaves then self.leaves(err) end
end

-- A core channel whose events lead to this owner.
local function core_channel(b, owner, window)
  local opened = assert(b.engine:open_channel(owner))
  b:send(fake.method(opened:id(), 20, 11, fake.long ""))
  assert(opened:call("confirm.select", {}))
  b:send(fake.method(opened:id(), 85, 11))
  opened:set_window(window)
  b:take()
  b:sent()
  return opened
end

function World:publisher(opts)
  local runtime, session = self.runtime, self.session
  local channel = setmetatable({ _runtime = runtime, timeout = 30, _session = session }, Channel)
  self.channel, self.window = channel, opts and opts.window or 65536
  channel._core = core_channel(self.broker, channel, self.window)
  local connection = {
    _runtime = runtime,
    _log = function(_, text) self.log[#self.log + 1] = text end,
    channel = function() return channel end,
  }
  local publisher, err = Publisher.new(connection, opts, 1)
  self.publisher_ = publisher
  return publisher, err
end

-- What the broker says, and what follows from it.
function World:say(...)
  self.broker:send(...)
  for _, event in ipairs(self.broker:take()) do
    local owner = event[2]
    if event[1] == "confirm" then
      owner._publisher:_confirmed()
    elseif event[1] == "failed" then
      owner._publisher:_failed(event[4], event[5], errors.new { kind = event[4], message = event[4] })
    end
  end
  self.runtime.settle()
end

function World:cut(err)
  self.broker.engine:eof "cut"
  self.broker:pump()
  self.broker:take()
  self.session.state = "closed"
  self.channel.hooks.lost(err or errors.new { kind = "closed", message = "cut" })
  self.runtime.settle()
end

-- The broker blocks publishing, and no longer.
function World:block()
  self:say(fake.method(0, 10, 60, fake.short "low on memory"))
  self.session.blocked = "low on memory"
end

function World:unblock()
  self.session.blocked = nil
  self.runtime.settle() -- who looks for room waits by now
  self.broker:send(fake.method(0, 10, 61))
  self.session.room:signal()
  self.runtime.settle()
end

function World:restore(before)
  self:connect()
  self.channel._session = self.session
  self.channel._core = core_channel(self.broker, self.channel, self.window)
  if before then before(self.channel) end
  self.channel.hooks.recovered()
  self.runtime.settle()
end

-- What was published since the last look: a list of bodies, those that carry the mark with a "!" in front.
function World:published()
  local list, header = {}, nil
  self.ids = {}
  for _, frame in ipairs(self.broker:sent()) do
    if frame.kind == 2 then header = frame.payload end
    if frame.kind == 3 then
      local mark = header:find("moonrabbit-resent", 1, true) and "!" or ""
      list[#list + 1] = mark .. frame.payload
      self.ids[#self.ids + 1] = header:match("%x+%-" .. ("%x"):rep(12))
    end
  end
  return list
end

local function outcomes(list)
  local out = {}
  for i, c in ipairs(list) do out[i] = c:outcome() end
  return out
end

-- ---- The parts ----------------------------------------------------------------------------------------

describe("retry policies of a publisher #smoke", function()
  it("are on by default, and off when told so", function()
    local policy = Policy.new(nil, "f", 1)
    assert.same({ true, false, 10 }, { policy.on_nack, policy.on_return, policy.attempts })
    assert.same(policy, Policy.new(true, "f", 1))
    assert.is_nil(Policy.new(false, "f", 1))
  end)

  it("wait longer each time, up to a bound, and give up", function()
    local policy = Policy.new({ first = 1, factor = 3, max = 5, attempts = 4, jitter = 0.5 }, "f", 1)
    assert.same({ 1, 3, 5, 5 }, {
      policy:delay("nacked", 1, 0.5), policy:delay("nacked", 2, 0.5), policy:delay("nacked", 3, 0.5),
      policy:delay("nacked", 4, 0.5),
    })
    assert.is_nil(policy:delay("nacked", 5, 0.5))
    assert.is_nil(policy:delay("unroutable", 1, 0.5))
    assert.same({ 0.5, 1.5 }, { policy:delay("nacked", 1, 0), policy:delay("nacked", 1, 1) })
    assert.equal(1, Policy.new({ first = 1, on_return = true }, "f", 1):delay("unroutable", 1, 0.5))
    assert.is_nil(Policy.new({ on_nack = false }, "f", 1):delay("nacked", 1, 0.5))
  end)

  it("refuse what makes no sense, naming it", function()
    local wrong = { first = -1, factor = 0.5, max = "x", attempts = 1.5, jitter = 2, on_nack = 1, deadline = -1 }
    for field, value in pairs(wrong) do
      fails("option '" .. field .. "'", Policy.new, { [field] = value }, "f", 1)
    end
    fails("did you mean 'attempts'", Policy.new, { attemts = 1 }, "f", 1)
    fails("option 'retry' must be a boolean or a table", function() world():publisher { retry = 5 } end)
  end)
end)

describe("the ring of a publisher #smoke", function()
  it("grows, keeps its order, and shrinks from the front", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    local ring, route = Ring.new(), core.route({ message_id = "x" .. ids.ROOM }, true)
    for n = 1, 1000 do
      ring:reserve()
      assert.equal(n, ring:add(tostring(n), (channel:publish_route(route, tostring(n), n))))
      if n % 3 == 0 then
        b:send(fake.ack(1, n / 3))
        ring:advance()
      end
    end
    assert.same({ 334, 1000, 1024 }, { ring.first, ring.last, ring.size })
    for n = 334, 1000 do assert.equal(tostring(n), (ring:at(n))) end
    assert.equal(false, (ring:at(333)))
    ring:settle(335)
    assert.equal(666, #ring:unsettled())
    b:send(fake.ack(1, 1000, true))
    local over = {}
    ring:record(500).mine = true
    ring:advance(function(record) over[#over + 1] = record.number end)
    assert.same({ 1001, 0, { 500 } }, { ring.first, ring.bytes, over })
  end)
end)

describe("message ids of a publisher #smoke", function()
  it("are its own, and those that core stamps", function()
    assert.is_true(ids.prefix() ~= ids.prefix())
    assert.matches("^%x+%-$", ids.prefix())
    for _, n in ipairs { 1, 255, 16777215, 16777216, 281474976710655 } do
      assert.equal(("%012x"):format(n), ids.stamp(n))
    end
  end)
end)

-- ---- What becomes of messages -------------------------------------------------------------------------

describe("a publisher #smoke", function()
  local w, p

  local function start(opts)
    w = world()
    p = w:publisher(opts or { routing_key = "k" })
    return p
  end

  it("sends again what was not confirmed, in order, before anything newer, with the same id and a mark", function()
    start()
    local c = {}
    for i = 1, 5 do c[i] = p:send_async(tostring(i)) end
    assert.same({ "1", "2", "3", "4", "5" }, w:published())
    local first_ids = w.ids
    w:say(fake.ack(1, 1), fake.ack(1, 3))
    w:cut()
    assert.same({ "acked", "pending", "acked", "pending", "pending" }, outcomes(c))
    c[6], c[7] = p:send_async "6", p:send_async "7"
    assert.same({ unconfirmed = 5, unsent = 5, bytes = 6, resent = 0, stored = 0 }, p:stats())
    w:restore()
    c[8] = p:send_async "8"
    assert.same({ "!2", "!4", "!5", "6", "7", "8" }, w:published())
    assert.same({ first_ids[2], first_ids[4], first_ids[5] }, { w.ids[1], w.ids[2], w.ids[3] })
    w:say(fake.ack(1, 6, true))
    for i = 1, 8 do assert.equal("acked", c[i]:outcome()) end
    assert.same({ unconfirmed = 0, unsent = 0, bytes = 0, resent = 3, stored = 0 }, p:stats())
  end)

  it("survives one outage after the other, also amid its sending again", function()
    start { routing_key = "k", window = 3, max_kept = 100 }
    local c = {}
    for i = 1, 8 do c[i] = p:send_async(tostring(i)) end
    assert.same({ "1", "2", "3" }, w:published())
    w:cut()
    w:restore()
    assert.same({ "!1", "!2", "!3" }, w:published())
    w:say(fake.ack(1, 1))
    assert.same({ "4" }, w:published())
    w:cut()
    w:restore()
    assert.same({ "!2", "!3", "!4" }, w:published())
    for seq = 1, 7 do
      assert.is_true(w.channel._core:unconfirmed() <= 3)
      w:say(fake.ack(1, seq))
    end
    assert.same({ "5", "6", "7", "8" }, w:published())
    for i = 1, 8 do assert.equal("acked", c[i]:outcome()) end
    assert.equal(0, p:unconfirmed())
  end)

  it("never has more in flight than its window, whatever happens", function()
    math.randomseed(7)
    start { routing_key = "k", window = 10, max_kept = 1000, retry = { first = 0.1, jitter = 0, attempts = math.huge } }
    local c, sent, up, seen, done = {}, 0, true, {}, 0
    local low -- the highest seq of this channel that the broker has answered
    low = 0
    local function look()
      for _, body in ipairs(w:published()) do
        local number = tonumber((body:gsub("!", "")))
        seen[number] = (seen[number] or 0) + 1
        sent = sent + 1
      end
    end
    for step = 1, 3000 do
      local dice = math.random(20)
      if dice <= 10 and #c < 500 then
        c[#c + 1] = assert(p:send_async(tostring(#c + 1), { timeout = 0 }))
      elseif dice == 11 and up then
        look()
        w:cut()
        up = false
      elseif dice >= 12 and not up and dice <= 14 then
        w:restore()
        up, low, sent = true, 0, 0
      elseif up and sent > low then
        low = low + 1
        w:say(math.random(4) == 1 and fake.nack(1, low) or fake.ack(1, low))
      end
      if up then look() end
      assert.is_true(w.channel._core:unconfirmed() <= 10, "step " .. step)
      if step % 10 == 0 then w.runtime.advance(0.05) end
    end
    if not up then
      w:restore()
      low, sent = 0, 0
    end
    for _ = 1, 5000 do
      look()
      if sent > low then
        low = low + 1
        w:say(fake.ack(1, low))
      end
      w.runtime.advance(0.02)
      if p:unconfirmed() == 0 then break end
    end
    for i, confirmation in ipairs(c) do
      assert.equal("acked", confirmation:outcome(), "message " .. i)
      assert.truthy(seen[i])
      done = done + 1
    end
    assert.truthy(done >= 400)
    assert.same({ 0, 0, 0 }, { p:unconfirmed(), p:stats().bytes, p._keeper._due })
  end)

  it("sends what was nacked again after a pause, and gives up after so many times", function()
    start { routing_key = "k", retry = { first = 1, factor = 2, jitter = 0, attempts = 2 } }
    local c, other = p:send_async "1", p:send_async "2"
    w:say(fake.nack(1, 1), fake.ack(1, 2))
    assert.same({ "pending", "acked" }, outcomes { c, other })
    assert.same({ "1", "2" }, w:published())
    w.runtime.advance(0.9)
    assert.same({}, w:published())
    w.runtime.advance(0.2)
    assert.same({ "!1" }, w:published())
    w:say(fake.nack(1, 3))
    w.runtime.advance(1.9)
    assert.same({}, w:published())
    w.runtime.advance(0.2)
    assert.same({ "!1" }, w:published())
    w:say(fake.nack(1, 4))
    assert.equal("nacked", c:outcome())
    local none, err = c:wait(0)
    assert.is_nil(none)
    assert.equal("nacked", err.kind)
    assert.equal(0, p:unconfirmed())
    local result
    w.runtime.run(function() result = { p:wait(1) } end)
    assert.is_nil(result[1])
    assert.same({ 1, "nacked" }, { result[2].failed[1].seq, result[2].failed[1].outcome })
    w.runtime.run(function() result = { p:wait(1) } end)
    assert.is_true(result[1])
  end)

  -- When a channel is left there is another one of the same connection, a moment later: `opened(err)` is called.
  -- `under_way`: how many publishes of the old one are not settled; 0 by default.
  local function leaves_channels(opened, under_way)
    w.channel.leaves = function(err)
      assert.equal("nacked", err.kind)
      assert.equal(under_way or 0, w.channel._core:unconfirmed())
      w.channel._core:close(200, "Goodbye")
      w.channel.hooks.lost(errors.new { kind = "closed", message = "left", temporary = true })
      opened()
      w.runtime.spawn(function()
        w.runtime.sleep(0.01)
        w.channel._core = core_channel(w.broker, w.channel, w.window)
        w.channel.hooks.recovered()
      end)
    end
  end

  it("goes by another channel when the broker refuses again and again on this one, and nothing is under way", function()
    start { routing_key = "k", retry = { first = 0.1, factor = 1, jitter = 0, attempts = math.huge } }
    local sequence, renewed = 0, {}
    leaves_channels(function()
      sequence = 0
      renewed[#renewed + 1] = w.runtime.now()
    end)
    local function refuse(n)
      sequence = sequence + n
      w:say(fake.nack(w.channel._core:id(), sequence, true))
    end
    local c = { p:send_async "1", p:send_async "2" }
    for _ = 1, 3 do
      assert.equal(2, #w:published())
      refuse(2)
      assert.same({}, renewed)
      w.runtime.advance(0.11)
    end
    assert.equal(1, #renewed)
    w.runtime.advance(0.02)
    assert.same({ "!1", "!2" }, w:published())
    -- Something under way, of which nobody knows what became: the channel stays.
    refuse(1)
    w.runtime.advance(0.6)
    assert.same({ "!1" }, w:published())
    assert.equal(1, #renewed)
    -- A full queue refuses on every channel: they are left ever more seldom.
    for _ = 1, 1000 do
      refuse(w.channel._core:unconfirmed())
      w.runtime.advance(0.11)
      w:published()
    end
    assert.truthy(#renewed >= 6 and #renewed <= 9, #renewed)
    for i = 3, #renewed - 1 do
      assert.truthy(renewed[i + 1] - renewed[i] > renewed[i] - renewed[i - 1], i)
    end
    w.runtime.advance(0.2)
    w:say(fake.ack(w.channel._core:id(), sequence + 2, true))
    assert.same({ "acked", "acked" }, outcomes(c))
    assert.same({ 0, 0 }, { p:unconfirmed(), p._keeper._due })
  end)

  it("goes by another channel under a steady load too: what is under way is settled first, none goes twice", function()
    start { routing_key = "k", retry = { first = 0.1, factor = 1, jitter = 0, attempts = math.huge } }
    local sequence, channels, under_way, order = 0, 1, {}, {}
    leaves_channels(function() sequence, channels = 0, channels + 1 end)
    -- The broker answers after 20 ms, while a message comes every 5: something is always under way.
    local function tick()
      for _, body in ipairs(w:published()) do
        sequence = sequence + 1
        if body:find "good" then order[#order + 1] = body end
        local answer = body:find "bad" and channels == 1 and fake.nack or fake.ack
        table.insert(under_way, { due = w.runtime.now() + 0.02, answer = answer(w.channel._core:id(), sequence) })
      end
      while under_way[1] and under_way[1].due <= w.runtime.now() do w:say(table.remove(under_way, 1).answer) end
      w.runtime.advance(0.005)
    end
    local c, expected = { p:send_async "bad" }, {}
    for i = 1, 400 do
      expected[i] = "good " .. i
      c[#c + 1] = p:send_async(expected[i])
      tick()
    end
    assert.equal(2, channels)
    assert.equal("acked", c[1]:outcome())
    for _ = 1, 20 do tick() end
    for i = 1, #c do assert.equal("acked", c[i]:outcome()) end
    assert.same(expected, order) -- none marked, none twice
    assert.same({ 0, 0 }, { p:unconfirmed(), p._keeper._due })
  end)

  it("stays on such a channel while something on it is not settled, and goes on after five seconds", function()
    start { routing_key = "k", retry = { first = 0.1, factor = 1, jitter = 0, attempts = math.huge } }
    local left = 0
    leaves_channels(function() left = left + 1 end)
    local slow, bad = p:send_async "slow", p:send_async "bad" -- the first is not answered
    for sequence = 2, 4 do
      w:say(fake.nack(1, sequence))
      w.runtime.advance(0.11)
    end
    assert.same({ "slow", "bad", "!bad", "!bad" }, w:published())
    local later = p:send_async "later"
    local result
    w.runtime.run(function() result = { p:send("too late", { timeout = 1 }) } end)
    w.runtime.advance(4.5)
    assert.same({}, w:published())
    assert.same({ "timeout", true }, { result[2].kind, result[2].unsent })
    w.runtime.advance(0.5)
    assert.same({ "!bad", "later" }, w:published())
    assert.equal(0, left)
    w.runtime.advance(0.6)
    w:say(fake.nack(1, 5), fake.ack(1, 6))
    w.runtime.advance(0.5)
    assert.equal(0, left) -- it waits again
    w:say(fake.ack(1, 1))
    w.runtime.advance(0.02)
    assert.equal(1, left)
    assert.same({ "acked", "acked", "pending" }, outcomes { slow, later, bad })
    assert.same({ "!bad" }, w:published())
  end)

  it("leaves such a channel in spite of that for one that is about to be given up, and only once in a while", function()
    start { routing_key = "k", retry = { first = 1, factor = 1, jitter = 0 } }
    -- One is never answered, and what is `served` only on another channel than the first.
    local copies, sequence, served, left = 0, 0, true, {}
    leaves_channels(function()
      left[#left + 1] = w.runtime.now()
      sequence = 0
    end, 1)
    local function tick(seconds)
      for _ = 1, seconds * 10 do
        for _, body in ipairs(w:published()) do
          sequence = sequence + 1
          if body:find "stuck" then
            copies = copies + 1
          else
            w:say((served and #left > 0 and fake.ack or fake.nack)(w.channel._core:id(), sequence))
          end
        end
        w.runtime.advance(0.1)
      end
    end
    local stuck, bad = p:send_async "stuck", p:send_async "bad"
    tick(120)
    assert.same({ "pending", "acked" }, outcomes { stuck, bad })
    assert.same({ 1, 2 }, { #left, copies })
    -- Where every channel refuses, it is given up, after as many attempts as ever.
    served = false
    local worse = {}
    for i = 1, 6 do
      worse[i] = p:send_async "worse"
      tick(120)
    end
    assert.same({ "nacked", "nacked", "nacked", "nacked", "nacked", "nacked" }, outcomes(worse))
    assert.equal("pending", stuck:outcome())
    assert.truthy(#left >= 3 and #left <= 5, #left)
    assert.equal(1 + #left, copies)
  end)

  it("leaves channels ever more seldom for those, too, while nothing else is under way", function()
    start { routing_key = "k", retry = { first = 0.02, factor = 1, jitter = 0, attempts = 3 } }
    local left, sequence = 0, 0
    leaves_channels(function() left, sequence = left + 1, 0 end)
    for i = 1, 1200 do -- for two minutes a full queue
      if i % 2 == 1 then p:send_async "refused" end
      w.runtime.advance(0.1)
      local n = #w:published()
      sequence = sequence + n
      if n > 0 then w:say(fake.nack(w.channel._core:id(), sequence, true)) end
    end
    assert.truthy(left >= 3 and left <= 15, left)
  end)

  describe("goes on after an error that was thrown amid its work (no memory):", function()
    -- Whoever uses the channel next meets it.
    local function throw_once(channel)
      local whole, thrown = channel._core, false
      channel._core = setmetatable({}, { __index = function(_, name)
        if not thrown then
          thrown = true
          error("not enough memory", 0)
        end
        return function(_, ...) return whole[name](whole, ...) end
      end })
    end

    it("sending what waited for a channel", function()
      start { routing_key = "k" }
      local c = { p:send_async "1" }
      w:cut()
      for i = 2, 3 do c[i] = p:send_async(tostring(i)) end
      fails("not enough memory", w.restore, w, throw_once)
      c[4] = p:send_async "4"
      assert.same({}, w:published())
      w.runtime.advance(1)
      assert.same({ "!1", "2", "3", "4" }, w:published())
      w:say(fake.ack(1, 4, true))
      assert.same({ "acked", "acked", "acked", "acked" }, outcomes(c))
    end)

    -- What was sent leaves by these two.
    local function throw_on_leaving()
      local session, thrown = w.session, 0
      session.dirty = false
      function session.touch()
        session.touch = nil
        thrown = thrown + 1
        error("not enough memory", 0)
      end
      return function() return thrown end
    end

    it("a message that is on the wire by then", function()
      start { routing_key = "k", max_kept = 10 }
      w:cut()
      local c = { p:send_async "1", p:send_async "2" }
      fails("not enough memory", w.restore, w, throw_on_leaving)
      assert.same({ "1" }, w:published())
      w.runtime.advance(1)
      assert.same({ "2" }, w:published())
      w:say(fake.ack(1, 2, true))
      assert.same({ "acked", "acked" }, outcomes(c))
    end)

    it("taking a message that is on the wire by then", function()
      start { routing_key = "k", message_id = "own" }
      local thrown = throw_on_leaving()
      fails("not enough memory", p.send_async, p, "1")
      assert.equal(1, thrown())
      assert.equal(1, p:unconfirmed())
      local c = p:send_async "2"
      assert.same({ "1", "2" }, w:published())
      w:say(fake.nack(1, 1), fake.ack(1, 2))
      assert.equal("acked", c:outcome())
      w.runtime.advance(1)
      assert.same({ "!1" }, w:published())
    end)

    it("sending again a message that is on the wire by then", function()
      start { routing_key = "k", retry = { first = 1, jitter = 0 } }
      local c = p:send_async "1"
      w:say(fake.nack(1, 1))
      w:published()
      throw_on_leaving()
      fails("not enough memory", w.runtime.advance, 1)
      assert.same({ "!1" }, w:published())
      w.runtime.advance(60)
      assert.same({}, w:published())
      w:say(fake.ack(1, 2))
      assert.equal("acked", c:outcome())
    end)

    it("sending again at its time", function()
      start { routing_key = "k", retry = { first = 1, jitter = 0 } }
      local c = p:send_async "1"
      w:say(fake.nack(1, 1))
      w:published()
      throw_once(w.channel)
      fails("not enough memory", w.runtime.advance, 1)
      assert.same({}, w:published())
      w.runtime.advance(1)
      assert.same({ "!1" }, w:published())
      w:say(fake.ack(1, 2))
      assert.equal("acked", c:outcome())
    end)
  end)

  describe("goes on after a task that it could not have:", function()
    local function without_tasks(fn, ...)
      local spawn = w.runtime.spawn
      w.runtime.spawn = function() error("no task", 0) end
      fails("no task", fn, ...)
      w.runtime.spawn = spawn
    end

    it("what is refused then is not taken, and what comes later goes when there is room", function()
      start()
      w:block()
      without_tasks(p.send_async, p, "1")
      assert.equal(0, p:unconfirmed())
      p:send_async "2"
      p:send_async "3"
      assert.same({}, w:published())
      w:unblock()
      assert.same({ "2", "3" }, w:published())
    end)

    it("what is not taken then is not stored either", function()
      start { routing_key = "k", outbox = "memory" }
      w:block()
      for i = 1, 2 do without_tasks(p.send_async, p, tostring(i)) end
      p:send_async "3"
      w:unblock()
      assert.same({ "3" }, w:published())
      w:say(fake.ack(1, 1))
      w.runtime.advance(1)
      assert.same({ unconfirmed = 0, unsent = 0, bytes = 0, resent = 0, stored = 0 }, p:stats())
    end)

    it("what has a deadline and waits for a channel is not taken", function()
      start { routing_key = "k", retry = { deadline = 5 } }
      w:cut()
      for i = 1, 2 do without_tasks(p.send_async, p, tostring(i)) end
      assert.equal(0, p:unconfirmed())
      local c = p:send_async "3"
      w.runtime.advance(6)
      assert.equal("lost", c:outcome())
    end)

    it("the next one keeps the times of all", function()
      start { routing_key = "k", retry = { first = 1, jitter = 0 } }
      for i = 1, 2 do p:send_async(tostring(i)) end
      w:published()
      without_tasks(w.say, w, fake.nack(1, 1))
      w:say(fake.nack(1, 2))
      w.runtime.advance(1)
      assert.same({ "!1", "!2" }, w:published())
    end)
  end)

  it("lets others be while there is no room, and tells them when there is", function()
    start()
    local looks = 0
    function w.session.try_flush()
      looks = looks + 1
      assert(looks < 100, "it spins")
    end
    local publishers = { p, w:publisher { routing_key = "k" }, w:publisher { routing_key = "k" } }
    w:block()
    for i, publisher in ipairs(publishers) do publisher:send_async(tostring(i)) end
    w.runtime.advance(2)
    assert.is_true(looks >= 3)
    assert.same({}, w:published())
    w:unblock()
    local published = w:published()
    table.sort(published)
    assert.same({ "1", "2", "3" }, published)
  end)

  it("keeps strict order with a window of one", function()
    start { routing_key = "k", window = 1, max_kept = 10, retry = { first = 1, jitter = 0 } }
    for i = 1, 3 do p:send_async(tostring(i)) end
    w:say(fake.nack(1, 1))
    assert.same({ "1" }, w:published()) -- and neither "2" nor "3"
    p:send_async "4"
    w.runtime.advance(1)
    assert.same({ "!1" }, w:published())
    w:say(fake.nack(1, 2))
    w:cut()
    w:restore()
    assert.same({ "!1" }, w:published()) -- at once with the new channel
    for seq = 1, 4 do w:say(fake.ack(1, seq)) end
    w.runtime.advance(10)
    assert.same({ "2", "3", "4" }, w:published())
    assert.equal(0, p:unconfirmed())
  end)

  it("reports a return at once, or sends it again where it is told to", function()
    start { routing_key = "k" }
    local c = p:send_async "1"
    local function returned(body, seq)
      return fake.method(1, 60, 50, fake.u16(312) .. fake.short "NO_ROUTE" .. fake.short "" .. fake.short "k")
        .. fake.content(1, body, "\32\0" .. core.encode_table { ["moonrabbit-seq"] = core.types.int64(seq) })
        .. fake.ack(1, seq)
    end
    w:say(returned("1", 1))
    assert.equal("unroutable", c:outcome())
    start { routing_key = "k", retry = { on_return = true, first = 1, jitter = 0 } }
    c = p:send_async "1"
    w:published()
    w:say(returned("1", 1))
    assert.equal("pending", c:outcome())
    w.runtime.advance(1)
    assert.same({ "!1" }, w:published())
    w:say(fake.ack(1, 2))
    assert.equal("acked", c:outcome())
  end)

  it("gives messages up when the policy's deadline has come", function()
    start { routing_key = "k", retry = { deadline = 5 } }
    local c = p:send_async "1"
    w.runtime.advance(100) -- a broker that is only slow has all the time it wants
    assert.equal("pending", c:outcome())
    w:cut()
    local late = p:send_async "2"
    w.runtime.advance(4)
    assert.same({ "pending", "pending" }, outcomes { c, late })
    w.runtime.advance(2)
    assert.same({ "lost", "lost" }, outcomes { c, late })
    local _, err = c:poll()
    assert.equal("timeout", err.kind)
    assert.matches("retry.deadline", err.message)
    w:restore()
    assert.same({}, w:published())
    assert.equal(0, p:unconfirmed())
  end)

  it("ends nothing that was confirmed in time", function()
    start { routing_key = "k", retry = { deadline = 5 } }
    local c = { p:send_async "1", p:send_async "2" }
    w:cut()
    w:restore()
    w:say(fake.ack(1, 2))
    w.runtime.advance(6)
    assert.same({ "lost", "acked" }, outcomes(c))
    assert.equal(0, p:unconfirmed())
  end)

  it("lets send wait through an outage, and takes back what was never sent when the time is up", function()
    start()
    local results = {}
    w.runtime.run(function() results[1] = { p:send "1" } end)
    w:cut()
    w.runtime.run(function() results[2] = { p:send("2", { timeout = 5 }) } end)
    w.runtime.run(function() results[3] = { p:send("3", { timeout = 50 }) } end)
    w.runtime.advance(6)
    assert.is_nil(results[2][1])
    assert.same({ "timeout", true }, { results[2][2].kind, results[2][2].unsent })
    w:restore()
    assert.same({ "!1", "3" }, w:published())
    w:say(fake.ack(1, 2, true))
    assert.same({ true }, results[1])
    assert.same({ true }, results[3])
    assert.equal(0, p:unconfirmed())
  end)

  it("does not take back what may have been sent", function()
    start()
    local result
    w.runtime.run(function() result = { p:send("1", { timeout = 5 }) } end)
    w:cut()
    w.runtime.advance(6)
    assert.same({ "timeout" }, { result[2].kind, result[2].unsent })
    w:restore()
    assert.same({}, { select(2, #w:published() - 1) })
    w:say(fake.ack(1, 1))
    assert.equal(0, p:unconfirmed())
  end)

  it("keeps no more than it may: messages and bytes", function()
    start { routing_key = "k", max_kept = 2, timeout = 7 }
    w:cut()
    assert(p:send_async "1")
    assert(p:send_async "2")
    local result
    w.runtime.run(function() result = { p:send_async("3", { timeout = 5 }) } end)
    w.runtime.advance(4)
    assert.is_nil(result)
    w.runtime.advance(2)
    assert.equal("overflow", result[2].kind)
    assert.matches("2 messages are kept already", result[2].message)
    w.runtime.run(function() result = { p:send_async("4", { timeout = 100 }) } end)
    w:restore()
    assert.same({ "1", "2" }, w:published())
    w:say(fake.ack(1, 1))
    assert.same({ "4" }, w:published())
    start { routing_key = "k", max_kept_bytes = 10 }
    assert(p:send_async "123456789012345") -- one is always taken
    w.runtime.run(function() result = { p:send_async("x", { timeout = 0 }) } end)
    assert.equal("overflow", result[2].kind)
    w:say(fake.ack(1, 1))
    assert(p:send_async "1")
  end)

  it("keeps messages with properties of their own, as they were", function()
    start { routing_key = "k", headers = { base = 1 } }
    local headers = { a = core.types.int8(5), list = { "x" } }
    local c = p:send_async("1", { routing_key = "other", headers = headers, message_id = "mine" })
    headers.list[1] = "changed later"
    w:cut()
    w:restore()
    local header = w.broker:sent()
    assert.truthy(header[1].payload:find("other", 1, true))
    local props = header[2].payload:sub(13)
    assert.truthy(props:find("mine", 1, true))
    assert.truthy(props:find("ab\5", 1, true)) -- still an int8
    assert.is_nil(props:find("changed", 1, true))
    assert.truthy(props:find("moonrabbit-resent", 1, true))
    w:say(fake.ack(1, 1))
    assert.equal("acked", c:outcome())
  end)

  it("sends a message whose headers just fit again without the mark", function()
    w = world()
    w.config = { frame_max = 4096 }
    w:connect()
    local sender = w:publisher { routing_key = "k", retry = { jitter = 0 } }
    local function send(size)
      return sender:send_async(("%d"):format(size), { headers = { much = ("x"):rep(size) } })
    end
    local size = 4096
    repeat
      size = size - 1
      local c, err = send(size)
      if not c then assert.matches("too_large", err.message) end
    until c
    assert(send(size - 100))
    local sent = w:published()
    assert.same({ tostring(size), tostring(size - 100) }, sent)
    w:cut()
    w:restore()
    assert.same({ tostring(size), "!" .. size - 100 }, w:published())
    w:say(fake.nack(1, 1))
    w.runtime.advance(5)
    assert.same({ tostring(size) }, w:published())
    w:say(fake.ack(1, 3, true))
    assert.equal(0, sender:stats().unconfirmed)
  end)

  it("ends what was on its way with the error that closed its channel for good, and nothing else", function()
    start { routing_key = "k", window = 1, max_kept = 10 }
    local c = { p:send_async "1", p:send_async "2" } -- the second one waits for the window
    w:cut(errors.new { kind = "channel", code = 404, message = "no exchange 'nope'" })
    local _, err = c[1]:wait(0)
    assert.same({ "channel", 404 }, { err.kind, err.code })
    assert.equal("pending", c[2]:outcome())
    w:restore()
    assert.same({ "2" }, w:published())
  end)

  it("ends everything when there is no other connection to come", function()
    start()
    local results, c = {}, p:send_async "1"
    w.runtime.run(function() results[1] = { p:send "2" } end)
    w.runtime.run(function() results[2] = { p:wait(50) } end)
    w:cut()
    w.channel.hooks.ended(errors.new { kind = "auth", message = "no longer welcome" })
    w.runtime.settle()
    assert.equal("lost", c:outcome())
    assert.equal("auth", results[1][2].kind)
    assert.is_nil(results[2][1])
    local _, err = p:send_async "3"
    assert.equal("auth", err.kind)
    assert.equal(0, p:unconfirmed())
  end)

  it("closes", function()
    start()
    local c = p:send_async "1"
    assert.is_true(p:close())
    assert.equal("lost", c:outcome())
    local _, err = p:send_async "2"
    assert.equal("closed", err.kind)
    assert.is_true(p:close())
  end)

  it("waits for many confirmations, in whatever order they come", function()
    start()
    local done, c = 0, {}
    for i = 1, 600 do c[i] = p:send_async(tostring(i)) end
    for i = 1, 600 do
      w.runtime.run(function()
        assert.is_true(c[i]:wait(100))
        done = done + 1
      end)
    end
    for i = 600, 2, -1 do w:say(fake.ack(1, i)) end
    w.runtime.advance(0.01)
    assert.equal(599, done)
    w:say(fake.ack(1, 1))
    assert.equal(600, done)
    assert.equal(0, p._keeper.waiters.count)
  end)

  it("sends once when it is told so", function()
    start { routing_key = "k", retry = false }
    assert.is_nil(p._keeper)
    fails("need `retry`", function() w:publisher { retry = false, outbox = "memory" } end)
  end)

  it("refuses wrong arguments, naming the caller's line", function()
    start()
    fails("body: string expected", p.send_async, p, 5)
    fails("body must be a string", p.send, p, nil)
    fails("unknown option 'routing'", p.send_async, p, "x", { routing = 1 })
    fails("publisher_spec.lua", function() p:send_async("x", { routing = 1 }) end)
    fails("publisher_spec.lua", function() p:send("x", { timeout = "y" }) end)
    fails("publisher_spec.lua", function() p:send_async(false) end)
    fails("max_kept", function() w:publisher { max_kept = 0 } end)
  end)
end)

-- ---- Outboxes ------------------------------------------------------------------------------------------

describe("an outbox in memory #smoke", function()
  local w, p

  it("keeps what has failed, and sends it again on a timer", function()
    w = world()
    p = w:publisher { routing_key = "k", outbox = { kind = "memory", interval = 10 }, retry = { attempts = 0 } }
    local c = p:send_async "1"
    p:send_async "2"
    assert.equal(2, p:stats().stored)
    w:say(fake.nack(1, 1), fake.ack(1, 2))
    assert.equal("nacked", c:outcome())
    w.runtime.advance(1)
    assert.same({ 1, 0 }, { p:stats().stored, p:stats().unconfirmed })
    assert.same({ "1", "2" }, w:published())
    w.runtime.advance(10)
    assert.same({ "!1" }, w:published())
    w:say(fake.ack(1, 3))
    w.runtime.advance(1)
    assert.equal(0, p:stats().stored)
    assert.is_true(p:close())
  end)

  it("lets send wait through an outage, and sends what it has taken though the time was up", function()
    w = world()
    p = w:publisher { routing_key = "k", outbox = "memory" }
    local results = {}
    w.runtime.run(function() results[1] = { p:send "1" } end)
    w:cut()
    w.runtime.run(function() results[2] = { p:send("2", { timeout = 5 }) } end)
    w.runtime.run(function() results[3] = { p:send("3", { timeout = 50 }) } end)
    w.runtime.advance(6)
    assert.same({ "timeout" }, { results[2][2].kind, results[2][2].unsent }) -- stored: it is not taken back
    w:restore()
    assert.same({ "!1", "2", "3" }, w:published())
    w:say(fake.nack(1, 2), fake.ack(1, 1), fake.ack(1, 3))
    w:cut() -- before the refused one's time has come
    w:restore()
    assert.same({ "!2" }, w:published())
    assert.same({ { true }, { true } }, { results[1], results[3] })
    w:say(fake.ack(1, 1))
    w.runtime.advance(1)
    assert.same({ 0, 0 }, { p:stats().stored, p:unconfirmed() })
  end)

  it("has what was not confirmed when it is closed, and nothing else", function()
    w = world()
    p = w:publisher { routing_key = "k", outbox = "memory", max_kept = 3, retry = { attempts = 0 } }
    local c, store = {}, p._keeper._outbox.store
    for i = 1, 3 do c[i] = p:send_async(tostring(i)) end
    local late
    w.runtime.run(function() late = { p:send "4" } end) -- waits for room
    w:say(fake.ack(1, 2), fake.nack(1, 3))
    assert.is_true(p:close())
    w.runtime.settle()
    assert.same({ "lost", "acked", "nacked" }, outcomes(c))
    assert.same({ "closed", 2 }, { late[2].kind, store:count() })
    assert.same({ "1", "3" }, { store:get(1).body, store:get(3).body })
  end)

  it("forgets none that waits for room when the next ones have failed", function()
    w = world()
    p = w:publisher { routing_key = "k", max_kept = 2, retry = { attempts = 0 },
      outbox = { kind = "memory", interval = 10 } }
    for i = 1, 2 do
      p:send_async "a"
      p:send_async "b"
      w:say(fake.nack(1, 2 * i - 1), fake.nack(1, 2 * i))
    end
    assert.equal(4, #w:published())
    w.runtime.advance(10)
    assert.same({ "!a", "!b" }, w:published()) -- there is no room for the other two
    w:say(fake.nack(1, 5))
    assert.same({ "!a" }, w:published())
    w:cut()
    w.runtime.advance(11) -- the first one's time has come again, and the last one still waits
    w:restore()
    assert.same({ "!b", "!a" }, w:published())
    w:say(fake.ack(1, 1), fake.ack(1, 2))
    assert.same({ "!a", "!b" }, w:published())
    w:say(fake.ack(1, 4, true))
    w.runtime.advance(1)
    assert.equal(0, p:stats().stored)
  end)

  it("keeps what cannot be sent by this connection, says so, and sends it by another one", function()
    w = world()
    p = w:publisher { routing_key = "k", outbox = { kind = "memory", interval = 10 }, retry = { attempts = 0 } }
    assert(p:send_async("large", { headers = { much = ("x"):rep(5000) } }))
    w:say(fake.nack(1, 1))
    w:cut()
    w.config = { frame_max = 4096 }
    w:restore()
    w.runtime.advance(11)
    assert.same({}, w:published())
    assert.equal(1, p:stats().stored)
    assert.matches("stays in the outbox.*too_large", w.log[1])
    local _, err = p:send_async("large too", { headers = { much = ("x"):rep(5000) } })
    assert.matches("too_large", err.message)
    assert.equal(2, p:stats().stored) -- until it is deleted, a moment later
    w.runtime.advance(1)
    assert.equal(1, p:stats().stored)
    w:cut()
    w.config = nil
    w:restore()
    w.runtime.advance(11)
    assert.same({ "!large" }, w:published())
    w:say(fake.ack(1, 1))
    w.runtime.advance(1)
    assert.equal(0, p:stats().stored)
  end)

  it("that cannot be read for a while loses nothing, and takes nothing new before it", function()
    local Memory = require "moonrabbit.outbox.memory"
    local open, store = Memory.open, Memory.open()
    for i = 1, 3 do -- as a file would have them from before
      local exchange, key, mandatory, props = core.pack({ routing_key = "k" }, true)
      store:add { exchange = exchange, routing_key = key, mandatory = mandatory, props = props, body = "old " .. i }
    end
    local broken = errors.new { kind = "outbox", message = "the disk cannot be read", temporary = true }
    function store.after(_, row)
      if row == 1 and broken then return nil, nil, broken end
      return Memory.after(store, row)
    end
    function store.get(_, row)
      if broken then return nil, broken end
      return Memory.get(store, row)
    end
    Memory.open = function() return store end
    finally(function() Memory.open = open end)
    w = world()
    p = w:publisher { routing_key = "k", outbox = { kind = "memory", interval = 10 }, retry = { attempts = 0 } }
    assert.same({ "!old 1" }, w:published())
    local results = {}
    w.runtime.run(function() results[1] = { p:send_async("new", { timeout = 1 }) } end)
    w.runtime.advance(2)
    assert.equal(broken, results[1][2])
    assert.matches("cannot be read", w.log[1])
    w:say(fake.nack(1, 1))
    w.runtime.run(function() results[2] = p:send_async("newer", { timeout = 100 }) end)
    broken = nil
    w.runtime.advance(20)
    assert.same({ "!old 2", "!old 3", "newer", "!old 1" }, w:published())
    broken = errors.new { kind = "outbox", message = "the disk cannot be read again", temporary = true }
    w:say(fake.ack(1, 2), fake.ack(1, 3), fake.nack(1, 4), fake.ack(1, 5))
    w.runtime.advance(11)
    assert.same({}, w:published())
    assert.matches("cannot be read again", w.log[2])
    broken = nil
    w.runtime.advance(10)
    assert.same({ "!newer" }, w:published())
    w:say(fake.ack(1, 6))
    w.runtime.advance(1)
    assert.equal(0, p:stats().stored)
  end)

  it("keeps a message until its confirm, however long that takes, and through outages", function()
    w = world()
    p = w:publisher { routing_key = "k", outbox = "memory" }
    local store = p._keeper._outbox.store
    p:send_async "1"
    assert.equal("1", store:get(1).body)
    w.runtime.advance(100)
    w:cut()
    w.runtime.advance(100)
    w:restore()
    w.runtime.advance(100)
    assert.equal(1, store:count())
    w:say(fake.ack(1, 1))
    w.runtime.advance(1)
    assert.equal(0, store:count())
  end)

  it("has a bound", function()
    w = world()
    p = w:publisher { routing_key = "k", outbox = { kind = "memory", most = 1 } }
    assert(p:send_async "1")
    local _, err = p:send_async "2"
    assert.equal("overflow", err.kind)
    w:say(fake.ack(1, 1))
    w.runtime.advance(1)
    assert(p:send_async "3")
  end)

  it("refuses options that make no sense", function()
    w = world()
    fails("'path', the file, is missing", function() w:publisher { outbox = { kind = "sqlite" } } end)
    fails("'kind' must be", function() w:publisher { outbox = {} } end)
    fails('"memory" or a table', function() w:publisher { outbox = "sqlite" } end)
    fails('"memory" or "sqlite"', function() w:publisher { outbox = { kind = "redis" } } end)
    fails("are for kind", function() w:publisher { outbox = { kind = "memory", path = "x" } } end)
    w.runtime.name = "resty"
    fails("would block every request", function() w:publisher { outbox = { kind = "sqlite", path = "/tmp/x" } } end)
  end)
end)

-- What the core does for publishers that publish again: confirmations that outlive their channel, stamped
-- routes, packed publishes.
local core = require "moonrabbit.core"
local fake = require "support.fake_broker"

local function fails(text, fn, ...)
  local ok, err = pcall(fn, ...)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(text, 1, true), "'" .. tostring(err) .. "' does not contain '" .. text .. "'")
end

-- The properties of what was published, as a consumer would see them.
local function received(b, id)
  local sent = b:sent()
  local header = sent[2].payload
  local message
  local channel = b:channel()
  local queue = b:consumer(channel, "c")
  b:send(fake.deliver(channel:id(), "c", 1, sent[3].payload, { properties = header:sub(13), routing_key = "k" }))
  message = queue:pop()
  assert.equal(id, message.properties.message_id)
  return message
end

describe("held confirmations #smoke", function()
  local b, channel, owner, route

  before_each(function()
    b = fake.new():open()
    channel, owner = b:channel(true)
    route = core.route({ routing_key = "k", message_id = "me-000000000000" }, true)
  end)

  it("know the publisher's number, and stamp the message id with it", function()
    local c = assert(channel:publish_route(route, "body", 255))
    assert.same({ "pending", 1, 255 }, { core.outcome(c) })
    assert.equal("body", received(b, "me-0000000000ff").body)
    assert.same({ "pending", 2, nil }, { core.outcome((channel:publish_route(route, "body"))) })
  end)

  it("are acked as others are", function()
    local c = assert(channel:publish_route(route, "body", 1))
    b:send(fake.ack(1, 1))
    assert.is_true(core.acked(c))
    assert.equal("acked", (core.outcome(c)))
  end)

  it("stay pending when they fail, until they are concluded", function()
    local c = assert(channel:publish_route(route, "body", 1))
    b:send(fake.nack(1, 1))
    assert.same({ { "failed", owner, 1, "nacked", c } }, b:take())
    assert.is_false(core.acked(c))
    assert.equal("pending", (core.outcome(c)))
    core.conclude(c, "nacked")
    assert.is_nil(core.acked(c))
    assert.equal("nacked", (core.outcome(c)))
    fails("invalid option", core.conclude, c, "eaten")
  end)

  it("go on with another publish of the same channel", function()
    local c = assert(channel:publish_route(route, "body", 1))
    b:send(fake.nack(1, 1))
    b:take()
    assert.equal(c, (channel:publish_route(route, "body", 1, c)))
    assert.same({ "pending", 2, 1 }, { core.outcome(c) })
    b:send(fake.nack(1, 2))
    assert.same({ { "failed", owner, 2, "nacked", c } }, b:take())
    channel:publish_route(route, "body", 1, c)
    b:send(fake.ack(1, 3))
    assert.is_true(core.acked(c))
  end)

  it("outlive their channel, and go on with another", function()
    local c = assert(channel:publish_route(route, "body", 1))
    local sure = assert(channel:publish_route(route, "body", 2))
    b:send(fake.ack(1, 2))
    b.engine:eof "gone"
    b:pump()
    assert.is_false(core.acked(c))
    assert.is_true(core.acked(sure))
    assert.same({ nil, "closed" }, { channel:publish_route(route, "body", 1, c) })
    assert.is_false(core.acked(c))
    local next_b = fake.new():open()
    local next_channel, next_owner = next_b:channel(true)
    assert.equal(c, (next_channel:publish_route(route, "body", 1, c)))
    assert.equal(next_owner, core.owner(c))
    channel, b, owner = nil, nil, nil
    collectgarbage()
    collectgarbage()
    assert.is_false(core.acked(c))
    next_b:send(fake.ack(1, 1))
    assert.is_true(core.acked(c))
  end)

  it("can be had before anything is published", function()
    local c = channel:hold(3)
    assert.same({ "pending", 0, 3 }, { core.outcome(c) })
    assert.equal(owner, core.owner(c))
    assert.equal(c, (channel:publish_route(route, "body", 3, c)))
    b:send(fake.ack(1, 1))
    assert.is_true(core.acked(c))
    b.engine:eof "gone"
    b:pump()
    local late = channel:hold(4)
    assert.is_false(core.acked(late))
    core.conclude(late, "lost")
    assert.equal("lost", (core.outcome(late)))
  end)

  it("are taken off the front of their ring as far as they are acked", function()
    local confirmations, kept = {}, {}
    for n = 5, 9 do -- the places of 5 … 9 in rings of 4 would collide: only the last four
      if n > 5 then
        local at = (n - 1) % 4 + 1
        confirmations[at], kept[at] = channel:publish_route(route, ("x"):rep(n), n), ("x"):rep(n)
      end
    end
    b:send(fake.ack(1, 1), fake.ack(1, 2), fake.ack(1, 4))
    assert.same({ 8, 13 }, { core.take_acked(confirmations, kept, 6, 9, 4) })
    assert.same({ kept[1], false, false, "xxxxxxxx" }, { "xxxxxxxxx", kept[2], kept[3], kept[4] })
    b:send(fake.ack(1, 3))
    assert.same({ 10, 17 }, { core.take_acked(confirmations, kept, 8, 9, 4) })
    assert.same({ 10, 0 }, { core.take_acked(confirmations, kept, 10, 9, 4) })
    fails("out of range", core.take_acked, confirmations, kept, 1, 1, 0)
    fails("out of range", core.take_acked, confirmations, kept, 0, 1, 4)
  end)

  it("refuse what is no confirmation, and routes with no room for a number", function()
    fails("confirmation expected", channel.publish_route, channel, route, "x", 1, {})
    local plain = core.route({ routing_key = "k" }, true)
    assert.same({ nil, "bad_argument" }, { channel:publish_route(plain, "x", 1) })
  end)
end)

describe("packed publishes #smoke", function()
  it("are what publish would send", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    local headers = { a = core.types.int8(1), b = "x", d = { core.types.bytes "\0\1", core.null } }
    local opts = { exchange = "ex", routing_key = "key", headers = headers, message_id = "m", persistent = false }
    channel:publish("\0body\255", opts)
    local exchange, key, mandatory, props = core.pack(opts, true)
    assert.same({ "ex", "key", true }, { exchange, key, mandatory })
    channel:publish_packed(exchange, key, mandatory, props, "\0body\255", 9)
    local sent = b:sent()
    for i = 1, 3 do
      -- All but the number of the publish.
      local one, other = sent[i].payload, sent[i + 3].payload
      assert.equal(#one, #other)
      assert.equal((one:gsub("(moonrabbit%-seql.......).", "%1")), (other:gsub("(moonrabbit%-seql.......).", "%1")))
    end
  end)

  it("take further headers, and leave the rest as it is", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    local exchange, key, mandatory, props = core.pack({ routing_key = "k", headers = { a = 1 } }, true)
    props = core.set_headers(props, { ["moonrabbit-resent"] = true })
    channel:publish_packed(exchange, key, mandatory, props, "x")
    assert.same({ a = 1, ["moonrabbit-resent"] = true }, received(b).headers)
    assert.equal(core.set_headers("", { a = true }), core.set_headers("\0\0", { a = true }))
  end)

  it("refuse properties that are none", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    assert.same({ nil, "bad_argument" }, { channel:publish_packed("", "k", true, "\128\0\9", "x", 1) })
    assert.same({ nil, "bad_argument" }, { core.set_headers("\128\0\9", {}) })
    assert.equal(0, channel:unconfirmed())
    fails("unknown option 'colour'", core.pack, { colour = 1 })
  end)
end)

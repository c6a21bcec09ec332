-- Properties, headers of every type, and forwarding.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local ok = broker.ok
local types = moonrabbit.types

describe("headers", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local conn, ch, queue, consumer

  before_each(function()
    conn = broker.connect()
    ch = ok(conn:channel { confirm = true })
    queue = ok(ch:queue_declare("", { exclusive = true })).queue
    consumer = ok(ch:consume(queue, { no_ack = true }))
  end)
  after_each(broker.close_all)

  local function round(opts)
    opts.routing_key = queue
    ok(ch:publish("body", opts))
    return ok(consumer:receive(5))
  end

  it("carry every property", function()
    local given = {
      content_type = "application/json", content_encoding = "utf-8", priority = 7, correlation_id = "corr",
      reply_to = "reply", expiration = "60000", message_id = "id-1", timestamp = 1700000000, type = "order.created",
      user_id = broker.parsed().user, app_id = "spec", delivery_mode = 2,
    }
    local message = round(given)
    for name, value in pairs(given) do
      if name ~= "routing_key" and name ~= "timestamp" then assert.equal(value, message.properties[name], name) end
    end
    assert.truthy(message.properties.timestamp)
    assert.same({}, message.headers)
  end)

  it("carry every Lua value and every wire type", function()
    local given = {
      text = "héllo\0bytes", empty = "", yes = true, no = false, int = 42, negative = -7, big = 2 ^ 53,
      float = 1.5, list = { 1, "two", { 3 } }, map = { nested = { deep = true } },
      void = moonrabbit.null, stamp = types.timestamp(1700000000), bytes = types.bytes "\1\2",
      i8 = types.int8(-8), u8 = types.uint8(200), i16 = types.int16(-300), u16 = types.uint16(60000),
      i32 = types.int32(-70000), i64 = types.int64(2 ^ 40), single = types.float(0.5), double = types.double(0.25),
      price = types.decimal(1234, 2),
    }
    local headers = round({ headers = given }).headers
    for _, name in ipairs { "text", "empty", "yes", "no", "int", "negative", "float" } do
      assert.equal(given[name], headers[name], name)
    end
    assert.equal(2 ^ 53, headers.big)
    assert.same({ 1, "two", { 3 } }, headers.list)
    assert.same({ nested = { deep = true } }, headers.map)
    assert.equal(moonrabbit.null, headers.void)
    assert.equal(-8, headers.i8)
    assert.equal(200, headers.u8)
    assert.equal(-300, headers.i16)
    assert.equal(60000, headers.u16)
    assert.equal(-70000, headers.i32)
    assert.equal(2 ^ 40, headers.i64)
    assert.equal(0.5, headers.single)
    assert.equal(0.25, headers.double)
    assert.truthy(headers.price == given.price)
    assert.is_nil(headers["moonrabbit-seq"])
  end)

  it("keep 64 bits exact on every Lua", function()
    local headers = round({ headers = { n = types.int64 "9007199254740993" } }).headers
    assert.equal("9007199254740993", tostring(headers.n))
  end)

  it("take integral floats among arguments as integers", function()
    ok(ch:queue_declare("", { exclusive = true,
      arguments = { ["x-expires"] = 60 * 1000 / 1, ["x-max-length"] = 1e3 } }))
  end)

  it("go on byte for byte when a message is forwarded", function()
    local second = ok(ch:queue_declare("", { exclusive = true })).queue
    local message = round {
      headers = { keep = types.int16(5), drop = "x", change = 1, stamp = types.timestamp(7) },
      content_type = "text/plain", expiration = "60000", message_id = "m1", priority = 3,
    }
    assert.is_true(ok(message:forward("", second)))
    local copy = ok(ch:get(second))
    assert.equal("body", copy.body)
    assert.same(message.properties, copy.properties)
    copy:ack()
    assert.is_true(ok(message:forward("", second, { set = { change = "new", added = true }, remove = { "drop" },
      remove_properties = { "expiration" } })))
    copy = ok(ch:get(second))
    assert.equal("new", copy.headers.change)
    assert.is_true(copy.headers.added)
    assert.is_nil(copy.headers.drop)
    assert.equal(5, copy.headers.keep)
    assert.is_nil(copy.properties.expiration)
    assert.equal("m1", copy.properties.message_id)
    copy:ack()
    local sent, err = message:forward("", "no-such-queue")
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
    -- Over another channel, and another connection.
    local other = ok(broker.connect():channel { confirm = true })
    local shared = ok(ch:queue_declare(broker.unique "q", { auto_delete = true })).queue
    assert.is_true(ok(message:forward("", shared, { channel = other })))
    assert.equal("body", ok(ch:get(shared, { no_ack = true })).body)
    ok(ch:queue_delete(shared))
    assert.has_error(function() message:forward("", second, { sett = {} }) end)
    assert.has_error(function() message:forward(nil) end)
  end)
end)

-- Kinds of queues against a real broker, on one node. Mirrored ones, and those of several nodes: spec/cluster.
local moonrabbit = require "moonrabbit"
local management = require "moonrabbit.management"
local broker = require "support.broker"
local ok, unique = broker.ok, broker.unique
local queue = moonrabbit.queue

describe("queue kinds", function()
  if broker.none() then pending(broker.none()) return end

  local conn, ch, names
  before_each(function()
    names = {}
    conn = broker.connect()
    ch = ok(conn:channel { confirm = true, prefetch = 10 })
  end)
  after_each(function()
    local cleaner = ok(broker.connect():channel())
    for _, name in ipairs(names) do cleaner:queue_delete(name) end
    broker.close_all()
  end)

  local function declare(kind, name)
    name = name or unique "kind"
    names[#names + 1] = name
    ok(ch:queue_declare(name, kind))
    return name
  end

  local function publish(name, from, to, opts)
    for i = from, to do
      local all = { routing_key = name }
      for key, value in pairs(opts or {}) do all[key] = value end
      ok(ch:publish("m" .. i, all))
    end
  end

  -- The bodies of the next n messages, acked.
  local function take(consumer, n)
    local bodies = {}
    for i = 1, n do
      local msg = ok(consumer:receive(10))
      bodies[i] = msg.body
      msg:ack()
    end
    return table.concat(bodies, " ")
  end

  it("classic: in order, bounded, dead-lettered by length, ttl and reject", function()
    local dead = declare(queue.classic { exclusive = false })
    local name = declare(queue.classic { max_length = 2, dead_letter_exchange = "", dead_letter_routing_key = dead })
    publish(name, 1, 3)
    local consumer = ok(ch:consume(dead))
    assert.equal("m1", take(consumer, 1))
    local msg = ok(ch:get(name))
    assert.equal("m2", msg.body)
    msg:reject { requeue = false }
    assert.equal("m2", take(consumer, 1))
    local brief = declare(queue.classic { ttl = 0.05, dead_letter_exchange = "", dead_letter_routing_key = dead })
    publish(brief, 4, 4)
    assert.equal("m4", take(consumer, 1))
  end)

  it("classic: one that is full refuses, when told so", function()
    local name = declare(queue.classic { max_length = 1, overflow = "reject-publish" })
    publish(name, 1, 1)
    local sent, err = ch:publish("m2", { routing_key = name })
    assert.is_nil(sent)
    assert.equal("nacked", err.kind)
  end)

  it("priority: the urgent first", function()
    local name = declare(queue.classic { max_priority = 3 })
    publish(name, 1, 2)
    publish(name, 3, 4, { priority = 3 })
    publish(name, 5, 5, { priority = 1 })
    assert.equal("m3 m4 m5 m1 m2", take(ok(ch:consume(name)), 5))
  end)

  it("lazy: messages wait on disk", function()
    local url = os.getenv "AMQP_MANAGEMENT_URL"
    local name = declare(queue.classic { lazy = true })
    publish(name, 1, 3)
    if url then
      assert.equal("lazy", ok(management.new(url):queue("/", name)).arguments["x-queue-mode"])
    end
    assert.equal("m1 m2 m3", take(ok(ch:consume(name)), 3))
  end)

  it("single active consumer: the next one takes over, in order", function()
    for _, kind in ipairs { queue.classic { single_active_consumer = true },
      queue.quorum { single_active_consumer = true } } do
      local name = declare(kind)
      local first = ok(ch:consume(name))
      local second = ok(ok(conn:channel { prefetch = 10 }):consume(name))
      publish(name, 1, 3)
      assert.equal("m1 m2 m3", take(first, 3))
      assert.is_nil((second:receive(0)))
      ok(first:cancel())
      publish(name, 4, 5)
      assert.equal("m4 m5", take(second, 2))
    end
  end)

  it("quorum: a delivery limit, then dead-lettered", function()
    local dead = declare(queue.quorum())
    local name = declare(queue.quorum { delivery_limit = 2, dead_letter_exchange = "", dead_letter_routing_key = dead })
    publish(name, 1, 1)
    local consumer = ok(ch:consume(name))
    local counts = {}
    for i = 1, 3 do
      local msg = ok(consumer:receive(10))
      counts[i] = msg.headers and msg.headers["x-delivery-count"] or 0
      msg:reject { requeue = true }
    end
    assert.same({ 0, 1, 2 }, counts)
    local msg = ok(ok(ch:consume(dead)):receive(10))
    assert.equal("m1", msg.body)
    assert.equal("delivery_limit", msg.headers["x-first-death-reason"])
    msg:ack()
  end)

  it("quorum: at-least-once dead-lettering waits for a queue that takes them", function()
    if not broker.name then pending "needs rabbitmqctl: else it takes three minutes" return end
    local setting = "application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, %d)."
    broker.ctl("eval", setting:format(200))
    finally(function() broker.ctl("eval", setting:format(180000)) end)
    local dead = unique "dead"
    local name = declare(queue.quorum { dead_letter_exchange = "", dead_letter_routing_key = dead,
      dead_letter_strategy = "at-least-once", overflow = "reject-publish", max_length = 100 })
    publish(name, 1, 1)
    local msg = ok(ch:get(name))
    msg:reject { requeue = false }
    assert.is_false(ok(ch:get(name)))
    -- Nobody takes dead letters yet: at most once, it would be lost now.
    declare(queue.quorum(), dead)
    local letter = ok(ok(ch:consume(dead)):receive(60))
    assert.equal("m1", letter.body)
    letter:ack()
  end)

  it("quorum: one that is full refuses", function()
    local name = declare(queue.quorum { max_length = 1, overflow = "reject-publish" })
    -- The limit is kept a few messages late: https://www.rabbitmq.com/docs/quorum-queues
    local refused
    for i = 1, 200 do
      local sent, err = ch:publish("m" .. i, { routing_key = name })
      if not sent then
        refused = err
        break
      end
    end
    assert.equal("nacked", refused.kind)
  end)

  describe("stream", function()
    local name
    before_each(function()
      name = declare(queue.stream { max_bytes = 100000000 })
      publish(name, 0, 4)
    end)

    local function from(offset, prefetch)
      local channel = ok(conn:channel { prefetch = prefetch or 10 })
      return ok(channel:consume(name, { arguments = queue.offset(offset) })), channel
    end

    it("starts at the first, again and again", function()
      assert.equal("m0 m1 m2 m3 m4", take(from "first", 5))
      assert.equal("m0 m1 m2 m3 m4", take(from "first", 5))
    end)

    it("starts at an offset, which messages carry", function()
      local consumer = from(3)
      local msg = ok(consumer:receive(10))
      assert.equal("m3", msg.body)
      assert.equal(3, msg.headers["x-stream-offset"])
      msg:ack()
      assert.equal("m4", take(consumer, 1))
    end)

    it("starts at the last chunk, and at what comes next", function()
      local consumer = from "last"
      local body = ok(consumer:receive(10)).body
      assert.matches("^m%d$", body)
      local coming = from "next"
      publish(name, 5, 5)
      assert.equal("m5", take(coming, 1))
    end)

    it("starts at a time, and some time ago", function()
      assert.equal("m0 m1", take(from(moonrabbit.types.timestamp(os.time() - 3600)), 2))
      assert.equal("m0 m1", take(from "1h", 2))
      local later = from(moonrabbit.types.timestamp(os.time() + 3600))
      publish(name, 6, 6)
      assert.equal("m6", take(later, 1))
    end)

    it("sends as much as its prefetch, and more for acks", function()
      local consumer, channel = from("first", 2)
      local one, two = ok(consumer:receive(10)), ok(consumer:receive(10))
      assert.equal("m0 m1", one.body .. " " .. two.body)
      ok(channel:qos(2)) -- a round trip: a third would have come
      assert.is_nil((consumer:receive(0)))
      one:ack()
      two:ack()
      assert.equal("m2 m3 m4", take(consumer, 3))
    end)

    it("gets a prefetch when it is given none, and needs acks", function()
      local channel = ok(conn:channel())
      local consumer = ok(channel:consume(name, { arguments = queue.offset "first" }))
      assert.equal("m0 m1 m2 m3 m4", take(consumer, 5))
      local none, err = ok(conn:channel()):consume(name, { no_ack = true })
      if none then none, err = none:receive(10) end
      assert.is_nil(none)
      assert.truthy(err.code == 540 or err.code == 406, err)
    end)
  end)
end)

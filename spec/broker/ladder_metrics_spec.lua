-- The metrics of a ladder on a real broker: what waits, what a full home holds up, and orphans.
local broker = require "support.broker"
local mr = require "moonrabbit"

local it = broker.it_unless(it, pending, broker.none()) -- luacheck: ignore 431

describe("the metrics of a ladder #app", function()
  local conn, id, home, ladder, m, offs

  before_each(function()
    if not broker.url then return end
    conn, id, home, offs = broker.connect(), broker.unique "ladder", broker.unique "home", {}
    ladder = require("moonrabbit.app.ladder").new(id)
    m = mr.metrics.new()
    local channel = broker.ok(conn:channel())
    broker.ok(channel:queue_declare(home, { durable = true, arguments = { ["x-max-length"] = 1,
      ["x-overflow"] = "reject-publish" } }))
    broker.ok(ladder:setup(conn, { home }))
  end)

  after_each(function()
    if not broker.url then return end
    for _, off in ipairs(offs) do off() end
    local channel = broker.ok(broker.connect():channel())
    for _, name in ipairs { home, id .. ".orphans", id .. ".wait.200ms", id .. ".wait.60s" } do
      channel:queue_delete(name)
    end
    broker.close_all()
  end)

  -- An app that consumes from home; it is looked at, and never starts.
  local function watch(opts)
    local app = mr.app { name = id, queues = { [home] = {} }, consumers = { { queue = home, handler = print } } }
    app._consuming = conn
    app.runners = { { queue = home, canaries = {}, disposal = { ladder = ladder, threshold = 0 } } }
    opts.interval = 0.2
    offs[#offs + 1] = m:watch_ladders(app, opts)
  end

  -- What is to be seen waiting has a step of a minute: the management API's figures are some seconds old.
  local function send(step, key, n)
    local exchange = broker.ok(ladder:exchange(conn, step))
    local channel = broker.ok(conn:channel { confirm = true })
    for _ = 1, n do broker.ok(channel:publish("x", { exchange = exchange, routing_key = key })) end
    channel:close()
  end

  local function shows(line)
    broker.eventually(function() return m:text():find("\nmoonrabbit_ladder_" .. line .. "\n", 1, true) end, 30, line)
  end

  it("by passive declares", function()
    send(60000, home, 3)
    send(200, "nobody", 2)
    watch {}
    shows(('waiting{ladder="%s",step="60s"} 3'):format(id))
    shows(('waiting{ladder="%s",step="200ms"} 0'):format(id))
    shows(('orphans{ladder="%s"} 2'):format(id))
    assert.falsy(m:text():find("ladder_stuck{", 1, true))
    local channel = broker.ok(conn:channel())
    broker.ok(channel:queue_delete(id .. ".wait.60s"))
    broker.eventually(function() return not m:text():find('step="60s"', 1, true) end, 30, "the step's going")
    shows(('known{ladder="%s"} 1'):format(id))
  end)

  it("by the management API, and what a full home holds up", function()
    if not os.getenv "AMQP_MANAGEMENT_URL" then pending "no management plugin" return end
    send(200, home, 4) -- one has room
    send(60000, home, 3)
    watch { management = broker.management() }
    shows(('stuck{ladder="%s",step="200ms"} 3'):format(id))
    shows(('waiting{ladder="%s",step="60s"} 3'):format(id))
    shows(('stuck{ladder="%s",step="60s"} 0'):format(id))
    shows(('orphans{ladder="%s"} 0'):format(id))
    local passive = broker.ok(broker.ok(conn:channel()):queue_declare(id .. ".wait.200ms", { passive = true }))
    assert.equal(0, passive.message_count) -- why a passive declare cannot tell
  end)
end)

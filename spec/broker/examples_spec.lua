-- Every example, as a process of its own, against a real broker.
local broker = require "support.broker"
local process = require "support.process"

local it_always = it

-- The tutorials have queues and exchanges of everyday names, and these specs delete them.
local it = broker.it_unless(it, pending, broker.not_ours())

local function example(name, ...) return { "examples/" .. name .. ".lua", ... } end

describe("examples #smoke", function()
  local running = {}

  local function start(words, messages)
    local one = process.start(words, { env = { MESSAGES = messages }, timeout = 60 })
    running[#running + 1] = one
    return one
  end

  local function send(...)
    local result = process.run(...)
    assert.equal("", result.err)
    assert.equal(0, result.code)
    return result.out
  end

  -- What earlier runs left behind would be received first.
  local function clean()
    if broker.not_ours() then return end
    for _, queue in ipairs { "hello", "task_queue", "rpc_queue" } do
      process.run { "bin/moonrabbit", "delete", "queue", queue }
    end
    for _, exchange in ipairs { "logs", "direct_logs", "topic_logs" } do
      process.run { "bin/moonrabbit", "delete", "exchange", exchange }
    end
  end
  setup(clean)
  teardown(clean)

  after_each(function()
    for _, one in ipairs(running) do one:stop() end
    running = {}
  end)

  it("1 hello world", function()
    assert.equal(" [x] Sent 'Hello World!'\n", send(example "tutorial1_send"))
    local receiver = start(example "tutorial1_receive", 1)
    assert.equal(0, receiver:wait(), receiver:err())
    assert.equal(" [*] Waiting for messages. To exit press CTRL+C\n [x] Received 'Hello World!'\n", receiver:out())
  end)

  it("2 work queues: the tasks are shared out", function()
    for i = 1, 4 do send(example("tutorial2_new_task", "task", i .. ".")) end
    local one, two = start(example "tutorial2_worker", 2), start(example "tutorial2_worker", 2)
    assert.equal(0, one:wait(), one:err())
    assert.equal(0, two:wait(), two:err())
    local all = one:out() .. two:out()
    for i = 1, 4 do assert.truthy(all:find(" [x] Received 'task " .. i .. ".'", 1, true)) end
    local _, done = all:gsub("%[x%] Done", "")
    assert.equal(4, done)
  end)

  it("3 publish/subscribe: everybody gets the line", function()
    local one, two = start(example "tutorial3_receive_logs", 1), start(example "tutorial3_receive_logs", 1)
    assert.truthy(one:await "Waiting for logs")
    assert.truthy(two:await "Waiting for logs")
    send(example("tutorial3_emit_log", "warning:", "all of you"))
    for _, listener in ipairs { one, two } do
      assert.equal(0, listener:wait(), listener:err())
      assert.truthy(listener:out():find(" [x] warning: all of you", 1, true))
    end
  end)

  it("3 publish/subscribe: a line that nobody listens to is no error", function()
    assert.equal(" [x] Sent 'info: Hello World!'\n", send(example "tutorial3_emit_log"))
  end)

  it("4 routing: by severity", function()
    local listener = start(example("tutorial4_receive_logs_direct", "warning", "error"), 2)
    assert.truthy(listener:await "Waiting for logs")
    send(example("tutorial4_emit_log_direct", "info", "not", "this"))
    send(example("tutorial4_emit_log_direct", "error", "this"))
    send(example("tutorial4_emit_log_direct", "warning", "and this"))
    assert.equal(0, listener:wait(), listener:err())
    assert.equal(" [*] Waiting for logs. To exit press CTRL+C\n [x] 'error':'this'\n [x] 'warning':'and this'\n",
      listener:out())
  end)

  it("5 topics: by pattern", function()
    local listener = start(example("tutorial5_receive_logs_topic", "kern.*", "*.critical"), 2)
    assert.truthy(listener:await "Waiting for logs")
    send(example("tutorial5_emit_log_topic", "cron.info", "not this"))
    send(example("tutorial5_emit_log_topic", "kern.critical", "A critical kernel error"))
    send(example("tutorial5_emit_log_topic", "cron.critical", "Another"))
    assert.equal(0, listener:wait(), listener:err())
    assert.truthy(listener:out():find(
      "[x] 'kern.critical':'A critical kernel error'\n [x] 'cron.critical':'Another'\n", 1, true))
  end)

  it("6 rpc", function()
    local server = start(example "tutorial6_rpc_server", 2)
    assert.truthy(server:await "Awaiting RPC requests")
    assert.equal(" [x] Requesting fib(20)\n [.] Got 6765\n", send(example("tutorial6_rpc_client", "20")))
    assert.equal(" [x] Requesting fib(x)\n [.] Got a number from 0 to 30, please\n",
      send(example("tutorial6_rpc_client", "x")))
    assert.equal(0, server:wait(), server:err())
    assert.truthy(server:out():find("[.] fib(20)", 1, true))
  end)

  it("6 rpc: a client without a server learns it at once", function()
    process.run { "bin/moonrabbit", "delete", "queue", "rpc_queue" }
    local result = process.run(example("tutorial6_rpc_client", "1"))
    assert.equal(1, result.code)
    -- The assert of PUC Lua 5.1 and 5.2 cannot show an error that is a table.
    local old = not rawget(_G, "jit") and (_VERSION == "Lua 5.1" or _VERSION == "Lua 5.2")
    assert.truthy(result.err:find(old and "assert" or "no queue", 1, true), result.err)
  end)

  it("7 publisher confirms", function()
    local out = send(example("tutorial7_publisher_confirms", "300"))
    for _, way in ipairs { "individually", "in batches", "asynchronously" } do
      assert.truthy(out:find("Published and confirmed 300 messages " .. way .. " in %d+ ms"), out)
    end
  end)

  it("those that want arguments say so", function()
    for _, name in ipairs { "tutorial4_receive_logs_direct", "tutorial5_receive_logs_topic" } do
      local result = process.run(example(name))
      assert.equal(1, result.code)
      assert.truthy(result.err:find "^Usage: ")
    end
  end)
end)

describe("the folder of examples", function()
  -- Where each folder in it is run.
  local folders = {
    shop = "spec/broker/guide_spec.lua", openresty = "spec/support/nginx_examples.lua",
    systemd = false, kubernetes = false, -- read by systemd and Kubernetes, not by us
  }

  it_always("holds no script that no spec runs", function()
    local specs = process.slurp "spec/broker/examples_spec.lua"
    local pipe = assert(io.popen "ls examples")
    for name in pipe:lines() do
      local script = name:match "^(.*)%.lua$"
      if script then
        assert.truthy(specs:find("%f[%w_]" .. script .. "%f[^%w_]"), name)
      elseif name ~= "README.md" then
        assert.truthy(folders[name] ~= nil, name)
        if folders[name] then assert.truthy(process.slurp(folders[name]):find("examples/" .. name, 1, true), name) end
      end
    end
    pipe:close()
  end)

  it_always("holds no example for nginx that no spec runs", function()
    local specs = ""
    for _, name in ipairs { "examples", "gateway", "events", "upstream" } do
      specs = specs .. process.slurp("spec/resty/" .. name .. "_spec.lua")
    end
    local pipe = assert(io.popen "ls examples/openresty")
    for name in pipe:lines() do assert.truthy(specs:find('"' .. name .. '"', 1, true), name) end
    pipe:close()
  end)
end)

describe("examples in other loops #smoke", function()
  local loops = require "support.loops"
  local path = package.path
  teardown(function() package.path = path end)

  for name, meanwhile in pairs {
    cqueues = "The other coroutine ran meanwhile", copas = "The server says hello", luv = "The timer ticked meanwhile",
  } do
    local it_runs = broker.it_unless(it, pending, not loops.has(name) and name .. " is not installed" or broker.none())
    it_runs(name, function()
      local result = process.run(example(name, "20"))
      assert.equal("", result.err)
      assert.equal(0, result.code)
      assert.equal(" [x] Published and handled 20 messages\n [.] " .. meanwhile .. "\n", result.out)
    end)
  end

  local it_polls = broker.it_unless(it, pending,
    not loops.has "cqueues" and "cqueues is not installed" or broker.none())
  it_polls("cqueues_poll", function()
    local result = process.run(example("cqueues_poll", "3"))
    assert.equal("", result.err)
    assert.equal(0, result.code)
    assert.equal(" [x] line 1\n [x] line 2\n [x] line 3\n", result.out)
  end)
end)

describe("the demo", function()
  local has_sqlite = pcall(require, "luasql.sqlite3")
  local reason = broker.none() or not has_sqlite and "LuaSQL for SQLite is not installed" or nil
  local it_runs = broker.it_unless(it, pending, reason)

  -- Without the name of a broker it leaves the restart out; `make demo` has it.
  local function demo(environment)
    return process.run({ "examples/shop/director/main.lua", "--quick" },
      { unset = { "MOONRABBIT_BROKER", "KEEP" }, env = environment, timeout = 120 })
  end

  it_runs("plays its story, counts for itself, and loses nothing", function()
    local result = demo {}
    assert.equal("", result.err)
    assert.equal(0, result.code, result.out)
    assert.truthy(result.out:find("\n  warm%-up +2,000 +2,000 +2,000 +0\n"), result.out)
    assert.truthy(result.out:find("\n  orders  .* 12 +12 +%d+ +0\n"), result.out) -- parked, replayed, duplicates, lost
    assert.truthy(result.out:find("0 orders paid twice, 0 mailed twice; 0 lost", 1, true), result.out)
    assert.truthy(result.out:find("\nNothing was lost.\n$"), result.out)
    assert.falsy(result.out:find("\27", 1, true))
  end)

  it_runs("leaves nothing in the broker", function()
    local management = broker.management()
    for _, queue in ipairs(broker.ok(management:queues())) do
      assert.falsy(queue.name:find("^moonrabbit%-demo"), queue.name)
    end
    for _, exchange in ipairs(broker.ok(management:exchanges())) do
      assert.falsy(exchange.name:find("^moonrabbit%-demo"), exchange.name)
    end
  end)

  it_runs("fails when something did not happen in time, and tells what", function()
    local result = demo { MOONRABBIT_DEMO_SECONDS = "1" }
    assert.equal(1, result.code, result.out)
    assert.truthy(result.err:find("not within 1 s", 1, true), result.err)
    assert.truthy(result.out:find("Not as it should be", 1, true), result.out)
    local kept = assert(result.out:match "Logs, books and mailbox: (/[^\n]+)", result.out)
    assert.truthy(process.slurp(kept .. "/director.log"))
    os.execute("rm -rf " .. process.quote(kept))
  end)

  it_runs("says what is wrong when there is no broker", function()
    local result = demo { AMQP_URL = "amqp://guest:guest@127.0.0.1:1/" }
    assert.equal(1, result.code)
    assert.truthy(result.err:find("is a broker there?", 1, true), result.err)
    assert.falsy(result.err:find("traceback", 1, true))
  end)
end)

local memory = require "moonrabbit.app.dedupe.memory"
local state = require "moonrabbit.app.dedupe.state"
local dedupe = require "moonrabbit.app.dedupe"

describe("dedupe.memory", function()
  local time
  local function clock() return time end
  before_each(function() time = 1000 end)

  it("knows what is new, running and done", function()
    local store = memory.new { ttl = 10, now = clock }
    assert.equal("new", store:begin("a", 5))
    assert.equal("running", store:begin("a", 5))
    assert.equal("new", store:begin("b", 5))
    assert.is_true(store:commit "a")
    assert.equal("done", store:begin("a", 5))
    assert.is_true(store:abort "b")
    assert.equal("new", store:begin("b", 5))
  end)

  it("forgets what is done after its ttl, and a claim after its lease", function()
    local store = memory.new { ttl = 10, now = clock }
    store:begin("a", 5)
    store:commit "a"
    store:begin("b", 5)
    time = time + 4.9
    assert.equal("running", store:begin("b", 5))
    time = time + 0.1
    assert.equal("new", store:begin("b", 5))
    assert.equal("done", store:begin("a", 5))
    time = time + 5
    assert.equal("new", store:begin("a", 5))
  end)

  it("a commit after the lease counts all the same", function()
    local store = memory.new { ttl = 10, now = clock }
    store:begin("a", 1)
    time = time + 2
    store:commit "a"
    assert.equal("done", store:begin("a", 1))
  end)

  it("is bounded: the oldest done keys go first, and are counted; claims never", function()
    local store = memory.new { ttl = 100, max = 3, now = clock }
    for _, key in ipairs { "a", "b", "c" } do
      assert.equal("new", store:begin(key, 50))
      store:commit(key)
    end
    assert.equal("new", store:begin("d", 50))
    assert.equal(1, store.evicted)
    assert.equal("done", store:begin("b", 50))
    assert.equal("new", store:begin("e", 50))
    assert.equal("new", store:begin("f", 50))
    assert.equal(3, store.evicted)
    local none, err = store:begin("g", 50)
    assert.is_nil(none)
    assert.equal("overflow", err.kind)
    assert.equal("running", store:begin("d", 50))
    time = time + 50 -- their owners have died
    assert.equal("new", store:begin("g", 50))
  end)

  it("a key that is committed again is remembered from then on, and counted once", function()
    local store = memory.new { ttl = 10, max = 2, now = clock }
    store:commit "a"
    time = time + 6
    store:commit "a"
    time = time + 6
    assert.equal("done", store:begin("a", 1))
    assert.equal(1, store.count)
    time = time + 5
    assert.equal("new", store:begin("a", 1))
    assert.equal(0, store.count)
  end)

  it("hands over what it knows", function()
    local old = memory.new { ttl = 10, now = clock }
    old:commit "done"
    old:begin("running", 5)
    time = time + 1
    local store = memory.new { ttl = 20, now = clock }
    store:restore(old:state())
    assert.equal("done", store:begin("done", 5))
    assert.equal("running", store:begin("running", 5))
    time = time + 18.9
    assert.equal("done", store:begin("done", 5))
    time = time + 0.1
    assert.equal("new", store:begin("done", 5))
  end)

  it("takes the clock of the runtime it is attached to", function()
    local store = memory.new { ttl = 10 }
    store:attach { now = clock }
    store:commit "a"
    time = time + 10
    assert.equal("new", store:begin("a", 1))
  end)

  it("stays small over many keys", function()
    local store = memory.new { ttl = 1, now = clock }
    for i = 1, 10000 do
      time = time + 0.01
      store:begin("key " .. i, 5)
      store:commit("key " .. i)
    end
    local known, places = 0, 0
    for _ in pairs(store.known) do known = known + 1 end
    local block = store.oldest
    while block do
      places = places + #block
      block = block.after
    end
    assert.is_true(known <= 101)
    assert.is_true(store.count <= 101)
    assert.is_true(places <= 512, places)
  end)

  it("stays small over many keys that are never forgotten in time", function()
    local store = memory.new { ttl = 1e6, max = 1000, now = clock }
    for i = 1, 10000 do
      store:begin("key " .. i, 5)
      store:commit("key " .. i)
    end
    assert.equal(1000, store.count)
    assert.equal(9000, store.evicted)
    assert.equal("done", store:begin("key 9001", 5))
    assert.equal("new", store:begin("key 9000", 5))
    local blocks, block = 0, store.oldest
    while block do
      blocks = blocks + 1
      block = block.after
    end
    assert.is_true(blocks <= 6, blocks)
  end)

  it("forgets claims whose owners have died before keys that are done, once in a while", function()
    local store = memory.new { ttl = 1000, max = 10, now = clock }
    for i = 1, 5 do store:begin("dead " .. i, 50) end
    time = time + 50
    for i = 1, 100 do
      store:begin("key " .. i, 50)
      store:commit("key " .. i)
    end
    assert.equal(10, store.count)
    assert.equal(0, store.running)
  end)

  it("does what a plain one does, whatever is asked of it", function()
    local ttl, lease, max = 10, 4, 5000 -- never full
    local store, done, claims = memory.new { ttl = ttl, max = max, now = clock }, {}, {}
    local seed = 4711
    local function random(n)
      seed = seed * 16807 % 2147483647
      return seed % n + 1
    end
    for _ = 1, 20000 do
      local key = "key " .. random(40)
      local what = random(4)
      if what == 1 then
        store:commit(key)
        done[key], claims[key] = time + ttl, nil
      elseif what == 2 then
        store:abort(key)
        claims[key] = nil
      else
        local expected = (done[key] or 0) > time and "done" or (claims[key] or 0) > time and "running" or "new"
        if expected == "new" then done[key], claims[key] = nil, time + lease end
        assert.equal(expected, store:begin(key, lease))
      end
      time = time + random(100) / 500
    end
  end)

  it("takes the time from its caller, unless it has a clock of its own", function()
    local store = memory.new { ttl = 10 }
    store:attach { now = clock }
    store:begin("a", 5, 2000)
    store:commit("a", 2000)
    assert.equal("done", store:begin("a", 5, 2009))
    assert.equal("new", store:begin("a", 5, 2010))
    store = memory.new { ttl = 10, now = clock }
    store:commit("a", 1)
    assert.equal("done", store:begin("a", 5, 5000))
  end)

  it("of Redis has TLS where its URL says so, and options of TLS that there are", function()
    local function refuses(text, opts)
      local ok, err = pcall(dedupe.redis, opts)
      assert.is_false(ok)
      assert.truthy(err:find(text, 1, true), err)
    end
    refuses("option 'tls' needs a URL that starts with rediss://", { url = "redis://localhost", tls = { ca = "x" } })
    refuses("dedupe.redis: tls: unknown option 'verfy' (did you mean 'verify'?)",
      { url = "rediss://localhost", tls = { verfy = false } })
    refuses("option 'path': there is no TLS over a unix socket", { url = "rediss://localhost", path = "/run/redis" })
    local store = dedupe.redis { url = "rediss://localhost", tls = { verify = false, ca = "/ca.pem" } }
    assert.error_matches(function() store:attach { name = "resty" } end, "'tls.ca' has no effect in nginx")
  end)

  it("of SQLite is a file, and has no user or host", function()
    for name, value in pairs { user = "me", password = "x", host = "db", port = 5 } do
      local ok, err = pcall(dedupe.sql, { driver = "sqlite3", source = "x.db", [name] = value })
      assert.is_false(ok)
      assert.truthy(err:find(("option '%s' is PostgreSQL's"):format(name), 1, true), err)
    end
  end)

  it("refuses options that cannot be", function()
    assert.has_error(function() dedupe.memory { ttl = -1 } end)
    assert.has_error(function() dedupe.memory { ttl = 0 } end)
    assert.error_matches(function() dedupe.memory { tll = 1 } end, "did you mean 'ttl'")
    assert.error_matches(function() dedupe.memory { max = 0 } end, "'max'")
  end)
end)

describe("dedupe.state", function()
  local states, time, store, moves

  local function key(id, to) return store.key(function(m) return m[1], m[2] end) { id, to } end

  before_each(function()
    states, time, moves = {}, 0, {}
    store = state.new {
      transitions = { [""] = { "created" }, created = { "paid", "cancelled" }, paid = { "shipped" } },
      current = function(id) return states[id] end,
      move = function(id, from, to)
        moves[#moves + 1] = from .. ">" .. to
        if (states[id] or "") ~= from then return false end
        states[id] = to
        return true
      end,
      now = function() return time end,
    }
  end)

  it("lets each step happen once, in its order", function()
    assert.equal("new", store:begin(key("1", "created"), 5))
    assert.equal("running", store:begin(key("1", "created"), 5))
    assert.is_true(store:commit(key("1", "created")))
    assert.equal("created", states["1"])
    assert.equal("done", store:begin(key("1", "created"), 5))
    assert.equal("running", store:begin(key("1", "shipped"), 5)) -- before it is paid
    assert.equal("new", store:begin(key("1", "paid"), 5))
    store:commit(key("1", "paid"))
    assert.equal("done", store:begin(key("1", "created"), 5))
    assert.equal("new", store:begin(key("1", "shipped"), 5))
    assert.same({ ">created", "created>paid" }, moves)
  end)

  it("refuses what can never come any more", function()
    states["1"] = "cancelled"
    local answer, err = store:begin(key("1", "shipped"), 5)
    assert.equal("refused", answer)
    assert.equal("'1' is 'cancelled', and can never become 'shipped'", err.message)
    assert.is_false(err.temporary)
    assert.equal("refused", (store:begin(key("1", "nonsense"), 5)))
    assert.equal("refused", (store:begin("no step", 5)))
  end)

  it("claims a thing for one step at a time, until the lease ends", function()
    states["1"] = "created"
    assert.equal("new", store:begin(key("1", "paid"), 5))
    assert.equal("running", store:begin(key("1", "cancelled"), 5))
    assert.equal("new", store:begin(key("2", "created"), 5))
    store:abort(key("1", "paid"))
    assert.equal("new", store:begin(key("1", "cancelled"), 5))
    time = 5
    assert.equal("new", store:begin(key("1", "paid"), 5))
    assert.is_true(store:commit(key("1", "cancelled"))) -- too late: nothing is moved
    assert.equal("created", states["1"])
  end)

  it("is away while the state cannot be told or moved", function()
    local broken = true
    store = state.new {
      transitions = { [""] = { "a" } },
      current = function()
        if broken == "throw" then error "no database" end
        if broken then return nil, "no database" end
      end,
      move = function()
        if broken then return nil, "no database" end
        return true
      end,
    }
    for _, how in ipairs { true, "throw" } do
      broken = how
      local none, err = store:begin(key("1", "a"), 5)
      assert.is_nil(none)
      assert.matches("the state of '1': .*no database", err.message)
      assert.is_true(err.temporary)
    end
    broken = false
    assert.equal("new", store:begin(key("1", "a"), 5))
    broken = true
    assert.is_nil((store:commit(key("1", "a"))))
    broken = false
    assert.is_true(store:commit(key("1", "a")))
  end)

  it("takes a step again where the circle of states leads back", function()
    store = state.new {
      transitions = { [""] = { "open" }, open = { "closed" }, closed = { "open" } },
      current = function(id) return states[id] end,
      move = function(id, _, to)
        states[id] = to
        return true
      end,
    }
    for _, to in ipairs { "open", "closed", "open" } do
      assert.equal("new", store:begin(key("1", to), 5))
      assert.equal("running", store:begin(key("1", to), 5))
      store:commit(key("1", to))
      assert.equal("done", store:begin(key("1", to), 5))
    end
  end)

  it("gives no key where the message names no step", function()
    assert.is_nil(key(nil, "paid"))
    assert.is_nil(key("1", nil))
  end)

  it("refuses options that cannot be", function()
    local fn = function() end
    assert.error_matches(function() dedupe.state { current = fn, move = fn } end, "'transitions' is missing")
    assert.error_matches(function() dedupe.state { transitions = {}, move = fn } end, "'current' is missing")
    assert.error_matches(function() dedupe.state { transitions = { a = "b" }, current = fn, move = fn } end,
      "transitions%['a'%] must be a list")
    for _, list in ipairs { { paid = true }, { "paid", nil, "cancelled" } } do
      assert.error_matches(function() dedupe.state { transitions = { a = list }, current = fn, move = fn } end,
        "transitions%['a'%] must be a list of states, without gaps")
    end
    assert.error_matches(function() dedupe.state { transitions = { a = { 1 } }, current = fn, move = fn } end,
      "must be a string")
  end)
end)

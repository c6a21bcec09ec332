-- Two sites, with a clock, sources and a connection of our own.
local Sites = require "moonrabbit.cluster.sites"

describe("two sites", function()
  local time, tasks, events, logged, moved, held, targets, dialled
  local cancelled = {}

  -- Until the next turn; or it throws, when the task is cancelled.
  local function wait()
    local thrown = coroutine.yield()
    if thrown then error(thrown, 0) end
  end

  -- A runtime whose clock the spec sets; tasks run until they wait, and go on by `turn`.
  local function runtime()
    return {
      now = function() return time end,
      cancelled = cancelled,
      cancel = function(task) coroutine.resume(task, cancelled) end,
      spawn = function(fn, ...)
        local arguments = { ... }
        tasks[#tasks + 1] = coroutine.create(function() fn(arguments[1]) end)
        return tasks[#tasks]
      end,
      condition = function()
        return { wait = wait, broadcast = function() end, signal = function() end }
      end,
    }
  end

  local function turn()
    for _, task in ipairs(tasks) do
      if coroutine.status(task) == "suspended" then assert(coroutine.resume(task)) end
    end
  end

  local function source(name)
    targets[name] = { name = name }
    return {
      targets = { targets[name] }, round = function() return { targets[name] } end,
      attach = function() end, failed = function() end, connected = function() end, lost = function() end,
      close = function() end,
    }
  end

  local function session()
    return {
      room = { signal = function() end }, channels = {},
      engine = { hold = function(_, value) held = value end },
    }
  end

  local function new(opts, past)
    opts.primary, opts.standby = opts.primary or {}, opts.standby or {}
    local sites = Sites.new({ primary = source "primary", standby = source "standby" }, opts,
      { runtime = runtime(), log = function(level, text) logged[#logged + 1] = level .. ": " .. text end, past = past })
    sites:attach {
      connection = { wait_open = function() return true end },
      emit = function(...) events[#events + 1] = table.concat({ ... }, " ") end,
      move = function(why) moved = why end,
      dial_primary = function()
        if type(dialled) == "function" then return dialled() end
        if dialled then return { close = function() end } end
        return nil, "down"
      end,
    }
    return sites
  end

  before_each(function()
    time, tasks, events, logged, moved, held, targets, dialled = 0, {}, {}, {}, nil, nil, {}, false
  end)

  local function round(sites)
    local names = {}
    for i, target in ipairs(assert(sites:round())) do names[i] = target.name end
    return table.concat(names, " ")
  end

  local function fail(sites, name, err)
    err = err or { kind = "refused", temporary = true }
    sites:failed(targets[name], err)
    return err
  end

  it("try both at first", function()
    local sites = new {}
    assert.equal("primary standby", round(sites))
    sites:connected(targets.primary, session())
    assert.same({}, events)
    assert.equal("primary", sites.current)
    assert.is_true(sites.released)
  end)

  it("fail over once the primary has been unreachable for long enough", function()
    local sites = new { after = 30 }
    round(sites)
    sites:connected(targets.primary, session())
    time = 100
    sites:lost(targets.primary, {})
    for at = 100, 129 do
      time = at
      assert.equal("primary", round(sites))
      fail(sites, "primary")
    end
    time = 130
    assert.equal("standby primary", round(sites))
    sites:connected(targets.standby, session())
    assert.same({ "site standby primary" }, events)
    assert.is_nil(held) -- there is no check
    assert.is_true(sites.released)
  end)

  it("look at the primary first where a connection takes the place of one that was lost long ago", function()
    local first = new { after = 30 }
    round(first)
    first:connected(targets.primary, session())
    first:lost(targets.primary, {})
    time = 29
    assert.equal("primary", round(new({ after = 30 }, first)))
    time = 31
    local second = new({ after = 30 }, first)
    assert.equal("primary standby", round(second))
    fail(second, "primary")
    time = 43
    assert.equal("standby primary", round(new({ after = 30 }, second)))
  end)

  it("stay when the primary comes back before that", function()
    local sites = new { after = 30 }
    round(sites)
    sites:connected(targets.primary, session())
    sites:lost(targets.primary, {})
    time = 29
    round(sites)
    sites:connected(targets.primary, session())
    time = 40
    sites:lost(targets.primary, {})
    time = 69
    assert.equal("primary", round(sites)) -- it counts anew
    assert.same({}, events)
  end)

  it("do not give up while a primary that refuses for good has a standby", function()
    local sites = new { after = 30 }
    round(sites)
    sites:connected(targets.primary, session())
    sites:lost(targets.primary, {})
    round(sites)
    assert.is_true(fail(sites, "primary", { kind = "auth", temporary = false }).temporary)
    time = 31
    round(sites)
    assert.is_false(fail(sites, "standby", { kind = "auth", temporary = false }).temporary)
  end)

  local function on_standby(opts)
    local sites = new(opts)
    round(sites)
    fail(sites, "primary")
    sites:connected(targets.standby, session())
    return sites
  end

  it("hold publishing at the standby until the check says yes", function()
    local answer, why = nil, "replication is behind"
    local sites = on_standby { standby = { check = function() return answer, why end } }
    assert.is_true(held)
    assert.matches("consume%-only", sites.session.held)
    turn()
    turn()
    assert.same({ "site standby", "held replication is behind" }, events) -- said once
    why = "still behind"
    turn()
    assert.equal("held still behind", events[3])
    answer = true
    turn()
    assert.is_false(held)
    assert.is_nil(sites.session.held)
    assert.equal("released standby", events[4])
    -- A reconnect at the same site stays released.
    sites:lost(targets.standby, {})
    assert.equal("standby primary", round(sites))
    held = nil
    sites:connected(targets.standby, session())
    assert.is_nil(held)
  end)

  it("take a check that throws for a no, and a release by hand for a yes", function()
    local sites = on_standby { standby = { check = function() error("broken", 0) end } }
    turn()
    assert.equal("held broken", events[2])
    sites:release()
    assert.is_false(held)
    turn()
    assert.equal("released standby", events[3])
    assert.is_nil(events[4])
  end)

  it("look after the primary whatever a check throws", function()
    dialled = true
    on_standby { hold = 0, standby = { check = function() error(setmetatable({}, { __tostring = error })) end } }
    turn()
    assert.matches("held .*__tostring fails", events[2])
    assert.matches("primary", moved)
  end)

  it("hold again on a second failover", function()
    local sites = on_standby { standby = { check = function() return false end }, after = 0 }
    sites:release()
    sites:lost(targets.standby, {})
    round(sites)
    sites:connected(targets.primary, session())
    sites:lost(targets.primary, {})
    round(sites)
    sites:connected(targets.standby, session())
    assert.is_true(held)
  end)

  it("fail back once the primary has been healthy for long enough, without a gap", function()
    local sites = on_standby { hold = 60 }
    turn()
    dialled = true
    turn() -- healthy since 0
    time = 50
    turn()
    dialled = false
    turn()
    dialled = true
    time = 61
    turn() -- healthy since 61
    assert.is_nil(moved)
    time = 121
    turn()
    assert.matches("primary", moved)
    sites:lost(targets.standby, {})
    assert.equal("primary", round(sites))
    -- It is gone again: back to whichever is there.
    fail(sites, "primary")
    assert.equal("standby primary", round(sites))
    sites:connected(targets.primary, session())
    assert.equal("site primary standby", events[2])
  end)

  it("do not fail back to a primary whose check says no, nor ever when told so", function()
    dialled = true
    on_standby { hold = 0, primary = { check = function() return nil, "not yet" end } }
    turn()
    turn()
    assert.is_nil(moved)
    local sites = on_standby { hold = math.huge }
    turn()
    assert.is_nil(moved)
    sites:close()
    turn()
  end)

  -- A connection to the primary that says how it was closed.
  local function dialled_connection()
    local connection = { closed = {} }
    function connection:close() self.closed[#self.closed + 1] = "waiting" end
    function connection:__close() self.closed[#self.closed + 1] = "at once" end
    dialled = function() return connection end
    return connection
  end

  it("close what looked at the primary when its task is cancelled in a check", function()
    local connection = dialled_connection()
    on_standby { primary = { check = function() wait() end } }
    turn()
    assert.same({}, connection.closed)
    coroutine.resume(tasks[1], cancelled)
    assert.same({ "at once" }, connection.closed)
    assert.equal("dead", coroutine.status(tasks[1]))
  end)

  it("close what looks at the primary, and end a dial that waits, with the connection", function()
    local connection = dialled_connection()
    local sites = on_standby { primary = { check = function() wait() end } }
    turn()
    sites:close()
    assert.same({ "at once" }, connection.closed)

    dialled = wait
    sites = on_standby {}
    turn()
    assert.equal("suspended", coroutine.status(tasks[2]))
    sites:close()
    assert.equal("dead", coroutine.status(tasks[2]))
  end)

  it("go on looking after the primary when that throws", function()
    on_standby { hold = 10 }
    dialled = function() error("no password today", 0) end
    turn()
    assert.matches("^error: .*no password today", logged[#logged])
    dialled = true
    turn()
    time = 10
    turn()
    assert.matches("primary", moved)
  end)

  it("do not move when the connection has gone to the primary meanwhile", function()
    local sites = on_standby { hold = 0 }
    dialled = function()
      wait()
      return { close = function() end }
    end
    turn()
    sites:lost(targets.standby, {})
    round(sites)
    sites:connected(targets.primary, session())
    turn()
    assert.is_nil(moved)
  end)

  it("do not end when the primary that they go back to refuses for good", function()
    local sites = on_standby { hold = 0 }
    dialled = true
    turn()
    assert.matches("primary", moved)
    sites:lost(targets.standby, {})
    assert.equal("primary", round(sites))
    assert.is_true(fail(sites, "primary", { kind = "auth", temporary = false }).temporary)
    assert.equal("standby primary", round(sites))
    assert.is_false(fail(sites, "standby", { kind = "auth", temporary = false }).temporary)
  end)

  it("do not end when one refuses for good and the other cannot be looked up now", function()
    local sites = new {}
    sites.sources.primary.round = function() return nil, { kind = "dns", temporary = true } end
    assert.equal("standby", round(sites))
    assert.is_true(fail(sites, "standby", { kind = "auth", temporary = false }).temporary)
  end)

  it("fail over from a primary that takes connections and lets nothing be restored", function()
    local sites = new { after = 30 }
    round(sites)
    sites:connected(targets.primary, session())
    sites:lost(targets.primary, {})
    for at = 1, 29 do
      time = at
      assert.equal("primary", round(sites))
      sites:connected(targets.primary, session())
      sites:lost(targets.primary, {}, true)
    end
    time = 30
    assert.equal("standby primary", round(sites))
  end)
end)
